"""Flags in, exit status out: what is the same for every command line.

A ConfigDict comes from `--config=FILE` (config_files.py). Each of its leaves can be overridden by
`--config.a.b=value`. An exception becomes an exit status and, where the user can mend it, one sentence on
stderr.
"""

import argparse
import contextlib
import difflib
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

from ngrpo_jax.config_files import config_of_run, load_config, put
from ngrpo_jax.errors import Preempted, UserError, exit_of, require
from ngrpo_jax.former_settings import former
from ngrpo_jax.runtime import console, ending

DEBUG = "NGRPO_DEBUG"  # set in the environment: every exception shows its traceback
# What all processes of a run raise at the same place, or none of them.
AGREED = (Preempted, FloatingPointError, SystemExit)


def run_command(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's main, or prints its module's docstring where --help is given.

    After the docstring come the settings: all, or those of the module's `SETTINGS_READ`.

    Exit status: 2 with one sentence for what the user can mend, 1 with one sentence for storage that fails,
    128 + signal for a run that was preempted, 1 with a traceback for everything else.
    """
    words = sys.argv if argv is None else argv
    console.spell_out_symbols()
    if not {"--help", "-h"}.isdisjoint(words[1:]):
        module = sys.modules[command.__module__]
        text = inspect.getdoc(module) or ""
        print(text)
        if "--config" in text:
            from ngrpo_jax.settings_text import for_terminal  # here alone: settings import jax

            print(f"\n{for_terminal(getattr(module, 'SETTINGS_READ', None))}")
        return
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
        if lost is not None and ending.received():
            # The same signal ended the other process, which was in no step yet, or no more.
            ending.preempted(ending.received())
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


def parse_flags(
    argv: Sequence[str], *, of_run: bool = False, **extra: str | bool | None
) -> tuple[Any, dict[str, Any]]:
    """Command line -> (ConfigDict, other flags). UserError with one sentence on anything wrong.

    Args:
      argv: program name first, then `--config=FILE`, `--workdir=DIR`, `--config.a.b=value`, extra flags.
      of_run: without `--config` the settings are those of the run in the workdir, by its config.json.
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
    without = values.get("target") is not None  # nothing is written where a target is compiled for
    path, workdir, kinds = values.pop("config"), values["workdir"], Settings.kinds()
    require(
        "://" not in (workdir or ""),
        f"--workdir={workdir} is an address and no folder; mount the bucket and name a folder below the "
        "mount (docs/launch.md).",
    )
    if path is None and of_run and workdir is not None:
        config = config_of_run(pathlib.Path(workdir))
    else:
        require(path is not None, "--config=configs/NAME.py is missing; configs/tiny.py is a good first one.")
        config = load_config(path)
    for argument in rest:
        name, text = _override(argument, kinds, values)
        put(config, name, kinds[name].read(name, text))
    require(without or bool(workdir), "--workdir=DIR is missing; it names the folder of the run.")
    return config, values


def _override(argument: str, kinds: Collection[str], options: Collection[str]) -> tuple[str, str]:
    """(name, text of the value) of a `--config.a.b=value`."""
    require(argument.startswith("-"), f"unexpected argument {argument!r}; write --FLAG=VALUE.")
    flag, equals, text = argument.partition("=")
    name = flag.removeprefix("--config.")
    if name == flag or name not in kinds:
        raise UserError(former(name) or _unknown(flag, kinds, options))
    require(bool(equals), f"{flag} has no value; write {flag}=VALUE.")
    return name, text


def _unknown(flag: str, kinds: Collection[str], options: Collection[str]) -> str:
    """The sentence about a flag that is none, with those that it may have meant."""
    name = flag.lstrip("-")
    meant = [f"--config.{one}" for one in kinds if one == name or one.endswith(f".{name}")]
    known = [
        *(f"--config.{one}" for one in kinds),
        *(f"--{option.replace('_', '-')}" for option in options),
    ]
    # The settings of the small model that a run makes come last: few mean them.
    near = sorted(meant, key=lambda one: "warm_start." in one) or _nearest(flag, known)
    return f"unknown setting {flag}" + (f"; did you mean {' or '.join(near)}?" if near else ".")


def _nearest(flag: str, known: Sequence[str]) -> list[str]:
    """The one of `known` that a wrong flag may have meant: by the initials of its last part, or by spelling.

    Flags that share no more than their section are not near: --config.optimizer.lr is no misspelling of .b2.
    """
    section, _, leaf = flag.rpartition(".")
    leaves = {one: one.rpartition(".")[2].lstrip("-") for one in known}
    short = [
        one
        for one, whole in leaves.items()
        if one.rpartition(".")[0] == section and "".join(part[0] for part in whole.split("_")) == leaf
    ]
    spelled = [
        one
        for one in difflib.get_close_matches(flag, known, n=5)
        if difflib.get_close_matches(leaf.lstrip("-"), [leaves[one]])
    ]
    return [*short, *spelled][:1]
