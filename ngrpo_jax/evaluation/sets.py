"""The data sets of one evaluation, as `eval.sets` and `--sets` name them, each with settings of its own.

An entry is words: a data source, then options, such as

    tfds:gpqa_diamond prompt=choice reward=choice samples=8 pass_k=1,8

The settings of a set are those of the run with the entry's source as `data.eval` and with its options, so
that code which takes settings needs no special case for sets.
"""

import dataclasses
import difflib
import pathlib
import re
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.settings import Settings

SEPARATOR = ";"  # between the entries of --sets


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One data set of an evaluation: its settings, and its name, on which keys and file names depend."""

    name: str
    settings: Settings


class _Option(NamedTuple):
    """An option of an entry: the setting it replaces, the pattern of its text, how that is read, in words."""

    section: str
    leaf: str
    pattern: str
    read: Callable[[str], Any]
    words: str


_NUMBER, _NAME = "[1-9][0-9]*", "[A-Za-z0-9_-]+"
_OPTIONS = {
    "samples": _Option("eval", "samples", _NUMBER, int, "a whole number above 0"),
    "pass_k": _Option(
        "eval", "pass_k", f"{_NUMBER}(,{_NUMBER})*", lambda text: (*map(int, text.split(",")),), "such as 1,8"
    ),
    "problems": _Option("eval", "problems", _NUMBER, int, "a whole number above 0"),
    "prompt": _Option("data", "prompt", ".+", str, "as data.prompt"),
    "reward": _Option("reward", "kind", ".+", str, "as reward.kind"),
    "name": _Option("", "", _NAME, str, "letters, digits, '_' and '-'"),
}


def parse_flag(flag: str) -> tuple[str, ...]:
    """The entries of a --sets flag."""
    entries = tuple(entry.strip() for entry in flag.split(SEPARATOR))
    entries = entries[:-1] if entries and not entries[-1] else entries
    require(bool(entries) and all(entries), f"--sets={flag!r} has an empty entry; write SOURCE; SOURCE.")
    return entries


def eval_sets(settings: Settings) -> list[EvalSet]:
    """The sets of `eval.sets`, or the one set of `data.eval`. UserError names the entry at fault."""
    if not settings.eval.sets:
        return [EvalSet(set_name(settings.data.eval), settings)]
    sets = [_parse(entry, settings) for entry in settings.eval.sets]
    for index, one in enumerate(sets):
        require(
            one.name not in [other.name for other in sets[:index]],
            f"eval.sets has two sets called {one.name!r}; give one of them another by name=NAME.",
        )
    return sets


def set_name(source: str) -> str:
    """The default name of a source: the stem of its file, or the name of its data set or function."""
    kind, _, rest = source.partition(":")
    body = rest.partition("?")[0]
    if kind in ("jsonl", "parquet", "json", "csv"):
        name = pathlib.PurePath(body).stem
    elif kind == "tfds":
        name = body.partition(":")[0].replace("/", "_")
    else:
        name = kind if kind == "arithmetic" else body.rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_").lower() or "set"


def _parse(entry: str, settings: Settings) -> EvalSet:
    try:
        source, *words = shlex.split(entry)
    except ValueError as error:
        raise UserError(f"eval.sets entry {entry!r} is not SOURCE [option=value ...] ({error}).") from error
    options = dict(_option(entry, word) for word in words)
    name = options.pop("name", set_name(source))
    changes: dict[str, dict[str, Any]] = {"data": {"eval": source}, "eval": {}, "reward": {}}
    for option, value in options.items():
        changes[_OPTIONS[option].section][_OPTIONS[option].leaf] = value
    try:
        sections = {
            section: dataclasses.replace(getattr(settings, section), **changed)
            for section, changed in changes.items()
        }
    except ValueError as error:
        raise UserError(f"eval.sets entry {entry!r}: {error}") from error
    return EvalSet(name, dataclasses.replace(settings, **sections))


def _option(entry: str, word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals or name not in _OPTIONS:
        near = difflib.get_close_matches(name, _OPTIONS, n=1)
        known = ", ".join(f"{option}=" for option in _OPTIONS)
        hint = f"did you mean {near[0]}=?" if near else f"options are {known}."
        raise UserError(f"eval.sets entry {entry!r}: {word!r} is no option; {hint}")
    option = _OPTIONS[name]
    understood = bool(re.fullmatch(option.pattern, text))
    require(
        understood, f"eval.sets entry {entry!r}: {word!r} is not understood; {name}= takes {option.words}."
    )
    return name, option.read(text)
