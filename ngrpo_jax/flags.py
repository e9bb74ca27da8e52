"""Flags in, exit status out: what is the same for every command line.

A ConfigDict comes from `--config=FILE`, each of its leaves can be overridden by `--config.a.b=value`, and
an exception becomes an exit status and, where the user can mend it, one sentence on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import config_flags

from ngrpo_jax.errors import Preempted, UserError, is_storage_failure, require
from ngrpo_jax.runtime import ending

DEBUG = "NGRPO_DEBUG"  # set in the environment: a UserError shows where it was raised
MENDABLE = (UserError, FloatingPointError)  # status 2: the same command would end the same way again
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
    try:
        with report_fatal():
            command(words)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print("stopped by the keyboard; the run goes on from its last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        _print_error(error)
        raise SystemExit(_status(error)) from None
    finally:
        ending.say_goodbye()


@contextlib.contextmanager
def report_fatal() -> Iterator[None]:
    """Ends a process of several at its first exception, and tells the other processes why.

    Nothing is unwound: what would be closed on the way may wait for the other processes, which wait for this
    one. What all processes raise together passes, and so does everything in a run of one process.
    """
    try:
        yield
    except AGREED:
        raise
    except BaseException as error:
        if not ending.watched():
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        status = 130 if isinstance(error, KeyboardInterrupt) else _status(error)
        news = ending.announce_end(text, status, communication=ending.is_communication_error(error))
        if news is None:
            _print_error(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if news is None else news["status"])


def _status(error: BaseException) -> int:
    return 2 if isinstance(error, MENDABLE) else 1


def _print_error(error: BaseException) -> None:
    """One sentence for the user's mistakes and for storage that fails; the traceback of everything else."""
    known = isinstance(error, MENDABLE) or is_storage_failure(error)
    if not known or os.environ.get(DEBUG):
        traceback.print_exception(error)
    if known:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose complaint is a UserError: one sentence with status 2."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says what there is.")


def parse_flags(argv: Sequence[str], **extra: str | bool | None) -> tuple[Any, dict[str, Any]]:
    """Command line -> (ConfigDict, other flags). ValueError with one sentence on anything wrong.

    Args:
      argv: program name first, then `--config=FILE`, `--workdir=DIR`, `--config.a.b=value`, extra flags.
      extra: further flags with their defaults; one whose default is False is a switch without a value.

    Returns:
      The locked ConfigDict with its overrides applied, and a dict of `workdir` and the extra flags.
    """
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "settings: a file of configs/", flag_values=values, sys_argv=list(argv)
    )
    absl_flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    for name, default in extra.items():
        if isinstance(default, bool):
            absl_flags.DEFINE_boolean(name, default, name, flag_values=values)
        else:
            absl_flags.DEFINE_string(name, default, name, flag_values=values)
    _check_flag_names(argv, extra)
    try:
        rest = values([argument for argument in argv if not _is_none(argument)])
    except absl_flags.Error as error:
        raise UserError(f"{error}".splitlines()[0]) from error
    for name in (argument.partition("=")[0] for argument in argv if _is_none(argument)):
        _set_none(values.config, name.removeprefix("--config."))
    require(len(rest) == 1, f"unexpected argument {rest[-1]!r}; settings are given as --config.a.b=value.")
    require(values.workdir is not None, "--workdir=DIR is missing; it names the folder of the run.")
    return values.config, {name: getattr(values, name) for name in ("workdir", *extra)}


def _is_none(argument: str) -> bool:
    return argument.startswith("--config.") and argument.endswith("=None")


def _set_none(config: Any, leaf: str) -> None:
    """absl has no word for None. Whether the leaf may be None is for `settings.resolve` to say."""
    *sections, name = leaf.split(".")
    for section in sections:
        config = config[section]
    config[name] = None


def _check_flag_names(argv: Sequence[str], extra: Mapping[str, str | bool | None]) -> None:
    """Names the unknown flag or setting, and the nearest one that exists, before absl parses anything."""
    given = [argument.partition("=")[0].lstrip("-") for argument in argv[1:] if argument.startswith("-")]
    paths = [argument.partition("=")[2] for argument in argv[1:] if argument.startswith("--config=")]
    require(bool(paths), "--config=configs/NAME.py is missing; configs/tiny.py is a good first one.")
    file = pathlib.Path(paths[0].partition(":")[0])
    require(file.is_file(), f"the config {str(file)!r} does not exist; see configs/ for those that do.")
    known = ["config", "workdir", *extra, *(f"config.{leaf}" for leaf in leaves(load_config(paths[0])))]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"unknown setting --{name}" + (f"; did you mean --{near[0]}?" if near else "."))


def load_config(path: str) -> Any:
    """The ConfigDict that a file of configs/ makes."""
    spec = importlib.util.spec_from_file_location("ngrpo_config", path)
    require(spec is not None and spec.loader is not None, f"{path!r} is no Python file.")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        require(hasattr(module, "get_config"), "it defines no get_config().")
        return module.get_config()
    except Exception as error:  # a config is the user's own code: whatever it raises is theirs to read
        raise UserError(f"the config {path} cannot be loaded: {type(error).__name__}: {error}") from error


def leaves(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a ConfigDict, in its order."""
    names: list[str] = []
    for name, value in config.items():
        names += leaves(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]
    return names
