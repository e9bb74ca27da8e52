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
from typing import Annotated, Any

from ngrpo_jax.errors import UserError, explained, require
from ngrpo_jax.schema import Check, Kind
from ngrpo_jax.settings import Settings
from ngrpo_jax.tasks.files import READERS

SEPARATOR = ";"  # between the entries of --sets


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One data set of an evaluation: its settings, and its name, on which keys and file names depend."""

    name: str
    settings: Settings


_OPTIONS = {  # option of an entry -> the setting that it replaces; the name of a set is no setting
    "samples": "eval.samples",
    "pass_k": "eval.pass_k",
    "problems": "eval.problems",
    "prompt": "data.prompt",
    "reward": "reward.kind",
    "name": "name",
}
_Name = Annotated[str, Check(re.compile("[A-Za-z0-9_-]+").fullmatch, "of letters, digits, '_' and '-'")]
_KINDS = {**Settings.kinds(), "name": Kind.of(_Name)}


def parse_flag(flag: str) -> tuple[str, ...]:
    """The entries of a --sets flag."""
    entries = tuple(entry.strip() for entry in flag.strip().removesuffix(SEPARATOR).split(SEPARATOR))
    require(all(entries), f"--sets={flag!r} has an empty entry; write SOURCE; SOURCE.")
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
    if kind in READERS:
        name = pathlib.PurePath(body).stem
    elif kind == "tfds":
        name = body.partition(":")[0].replace("/", "_")
    else:
        name = kind if kind == "arithmetic" else body.rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_").lower() or "set"


def _parse(entry: str, settings: Settings) -> EvalSet:
    with explained(ValueError, f"eval.sets entry {entry!r} is no list of words", "write SOURCE option=value"):
        source, *words = shlex.split(entry)
    sections: dict[str, dict[str, Any]] = {"data": {}, "eval": {}, "reward": {}}
    try:
        changes = {"name": set_name(source), "data.eval": source, **dict(map(_read_option, words))}
        name = changes.pop("name")
        for setting, value in changes.items():
            section, _, leaf = setting.partition(".")
            sections[section][leaf] = value
        replaced = {
            section: dataclasses.replace(getattr(settings, section), **leaves)
            for section, leaves in sections.items()
        }
    except ValueError as error:
        raise UserError(f"eval.sets entry {entry!r}: {error}") from error
    return EvalSet(name, dataclasses.replace(settings, **replaced))


def _read_option(word: str) -> tuple[str, Any]:
    """(the setting that an option replaces, its value)."""
    option, equals, text = word.partition("=")
    if not equals or option not in _OPTIONS:
        near = difflib.get_close_matches(option, _OPTIONS, n=1)
        known = ", ".join(f"{name}=" for name in _OPTIONS)
        hint = f"did you mean {near[0]}=?" if near else f"options are {known}."
        raise UserError(f"{word!r} is no option; {hint}")
    setting = _OPTIONS[option]
    return setting, _KINDS[setting].read(setting, text)
