"""Flags in, exit status out: what is the same for every command line.

A ConfigDict comes from `--config=FILE`, each of its leaves can be overridden by `--config.a.b=value`, and
an exception becomes an exit status and, where the user can mend it, one sentence on stderr.
"""

import argparse
import contextlib
import difflib
import inspect
import io
import os
import pathlib
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from ngrpo_jax.errors import Preempted, UserError, exit_of, require
from ngrpo_jax.former_settings import former, former_in
from ngrpo_jax.runtime import ending

DEBUG = "NGRPO_DEBUG"  # set in the environment: every exception shows its traceback
# What all processes of a run raise at the same place, or none of them.
AGREED = (Preempted, FloatingPointError, SystemExit)


def run_command(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's main, or prints its module's docstring where --help is given.

    Exit status: 2 with one sentence for what the user can mend, 1 with one sentence for storage that fails,
    128 + signal for a run that was preempted, 1 with a traceback for everything else.
    """
    words = sys.argv if argv is None else argv
    if not {"--help", "-h"}.isdisjoint(words[1:]):
        print(inspect.getdoc(sys.modules[command.__module__]))
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without × or é is no reason to end
            stream.reconfigure(errors="backslashreplace")
    try:
        with report_fatal():
            command(words)
    except SystemExit:
        raise
    except BaseException as error:
        status = _print_end(error)
        if argv is None and isinstance(error, KeyboardInterrupt | Preempted):
            ending.leave(status)  # XLA's threads may be at work
        raise SystemExit(status) from None
    if argv is None:
        ending.finish()


@contextlib.contextmanager
def report_fatal() -> Iterator[None]:
    """Prints the first exception of a process of several, and ends the process at once (`ending.shutdown`).

    What all processes raise together passes, and so does everything in a run of one process.
    """
    try:
        yield
    except AGREED:
        raise
    except BaseException as error:
        if not ending.several():
            raise
        lost = ending.lost_connection(error)
        if lost is None:
            status = _print_end(error)
        else:
            status = 1
            print(f"error: {lost}", file=sys.stderr)
        ending.shutdown(status, lost_connection=lost is not None)


def _print_end(error: BaseException) -> int:
    """Prints the sentence or the traceback of what ends the command; returns the exit status."""
    status, sentence = exit_of(error)
    if sentence is None or os.environ.get(DEBUG):
        traceback.print_exception(error)
    if sentence is not None:
        print(sentence, file=sys.stderr)
    return status


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose complaint is a UserError: one sentence with status 2."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says what there is.")


def parse_flags(argv: Sequence[str], **extra: str | bool | None) -> tuple[Any, dict[str, Any]]:
    """Command line -> (ConfigDict, other flags). UserError with one sentence on anything wrong.

    Args:
      argv: program name first, then `--config=FILE`, `--workdir=DIR`, `--config.a.b=value`, extra flags.
      extra: further flags with their defaults; one whose default is False is a switch without a value.

    Returns:
      The locked ConfigDict with its overrides applied, and a dict of `workdir` and the extra flags.
    """
    from ngrpo_jax.settings import Settings  # here alone: settings import jax

    parser = ArgumentParser(argv[0])
    for name, default in {"config": None, "workdir": None, **extra}.items():
        action = "store_true" if default is False else "store"
        parser.add_argument(f"--{name.replace('_', '-')}", action=action, default=default)
    options, rest = parser.parse_known_args(argv[1:])
    values = vars(options)
    path = values.pop("config")
    require(path is not None, "--config=configs/NAME.py is missing; configs/tiny.py is a good first one.")
    require(
        pathlib.Path(path).is_file(), f"the config {path!r} does not exist; see configs/ for those that do."
    )
    config, kinds = load_config(path), Settings.kinds()
    flags = {f"--config.{name}": name for name in kinds}
    for argument in rest:
        require(argument.startswith("-"), f"unexpected argument {argument!r}; write --FLAG=VALUE.")
        flag, equals, text = argument.partition("=")
        name = flag.removeprefix("--config.")
        require(
            flag in flags,
            former(name) or _unknown(flag, [*flags, *(f"--{option.replace('_', '-')}" for option in values)]),
        )
        require(bool(equals), f"{flag} has no value; write {flag}=VALUE.")
        section, _, leaf = name.rpartition(".")
        (config[section] if section else config)[leaf] = kinds[name].read(name, text)
    without = values.get("target") is not None  # nothing is written where a target is compiled for
    require(without or bool(values["workdir"]), "--workdir=DIR is missing; it names the folder of the run.")
    return config, values


def _unknown(flag: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(flag, known, n=1)
    return f"unknown setting {flag}" + (f"; did you mean {near[0]}?" if near else ".")


def load_config(path: str) -> Any:
    """The ConfigDict that a file of configs/ makes."""
    try:
        defined = runpy.run_path(path)
        require("get_config" in defined, "it defines no get_config().")
        return defined["get_config"]()
    except Exception as error:  # a config is the user's own code, so that any exception is the user's to mend
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
        raised = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"the config {path} cannot be loaded: {former_in(text) or raised}") from error
