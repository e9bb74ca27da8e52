"""The data sets of one evaluation: what `eval.sets` and `--sets` say, as settings of their own.

An entry is words: a data source, then options, such as

    tfds:gpqa_diamond prompt=choice reward=choice samples=8 pass_k=1,8

A set's settings are those of the run with another `data.eval` and the options put in, so that everything
that reads settings serves every set alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.settings import Settings

SEPARATOR = ";"  # between the entries of --sets
_WHOLE_NUMBER = re.compile(r"[1-9][0-9]*")


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One data set of an evaluation: its name, which keys and files depend on, and its settings."""

    name: str
    settings: Settings


def split(flag: str) -> tuple[str, ...]:
    """The entries of a --sets flag."""
    entries = tuple(entry.strip() for entry in flag.split(SEPARATOR))
    entries = entries[:-1] if entries and not entries[-1] else entries
    require(bool(entries) and all(entries), f"--sets={flag!r} has an empty entry; write SOURCE; SOURCE.")
    return entries


def eval_sets(settings: Settings) -> list[EvalSet]:
    """The sets of `eval.sets`, or the one set of `data.eval`. ValueError names the entry at fault."""
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
    """What a source is called: the file's stem, the data set's or the function's name."""
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
    sections = {section: getattr(settings, section) for section in ("data", "eval", "reward")}
    changes: dict[str, dict[str, Any]] = {"data": {"eval": source}, "eval": {}, "reward": {}}
    for option, value in options.items():
        section, leaf, _ = _OPTIONS[option]
        changes[section][leaf] = value
    try:
        changed = {section: dataclasses.replace(old, **changes[section]) for section, old in sections.items()}
    except ValueError as error:
        raise UserError(f"eval.sets entry {entry!r}: {error}") from error
    return EvalSet(name, dataclasses.replace(settings, **changed))


def _option(entry: str, word: str) -> tuple[str, Any]:
    option, equals, text = word.partition("=")
    known = [*_OPTIONS, "name"]
    if not equals or option not in known:
        near = difflib.get_close_matches(option, known, n=1)
        hint = f"did you mean {near[0]}=?" if near else f"options are {', '.join(f'{o}=' for o in known)}."
        raise UserError(f"eval.sets entry {entry!r}: {word!r} is no option; {hint}")
    if option == "name":
        require(
            bool(re.fullmatch(r"[A-Za-z0-9_-]+", text)),
            f"eval.sets entry {entry!r}: name {text!r} must be letters, digits, '_' and '-'.",
        )
        return option, text
    value = _OPTIONS[option][2](text)
    require(value is not None, f"eval.sets entry {entry!r}: {word!r} is not understood.")
    return option, value


def _number(text: str) -> int | None:
    return int(text) if _WHOLE_NUMBER.fullmatch(text) else None


def _numbers(text: str) -> Sequence[int] | None:
    numbers = tuple(_number(part) for part in text.split(","))
    return None if None in numbers else numbers  # type: ignore[return-value]


def _text(text: str) -> str | None:
    return text or None


# option of an entry -> (section, leaf, how its value is read; None where it cannot be)
_OPTIONS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "samples": ("eval", "samples", _number),
    "pass_k": ("eval", "pass_k", _numbers),
    "problems": ("eval", "problems", _number),
    "prompt": ("data", "prompt", _text),
    "reward": ("reward", "kind", _text),
}
