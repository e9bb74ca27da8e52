"""The settings as text, read from their declarations: for `--help` and for docs/settings.md.

python -m ngrpo_jax.settings_text > docs/settings.md
"""

import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ngrpo_jax.schema import Kind, Section
from ngrpo_jax.settings import Settings

_NOUNS = {int: "int", float: "float", bool: "bool", str: "str"}
_WIDTH = 80  # columns of `--help`


class Described(NamedTuple):
    """One setting: its whole name, type, allowed values, default, comment, and whether a resumed run may
    change it."""

    name: str
    type: str
    allowed: str
    default: str
    meaning: str
    may_change: bool


def sections() -> Iterator[tuple[str, str, list[Described]]]:
    """(name, first sentence, settings) of each section; settings without one come first, under "run"."""
    yield "run", "Settings without a section.", _described(Settings)
    for name, kind in typing.get_type_hints(Settings).items():
        if isinstance(kind, type) and issubclass(kind, Section):
            doc = inspect.getdoc(kind) or ""
            yield name, " ".join(doc.split("\n\n")[0].split()), _described(kind)


def _described(section: type[Section]) -> list[Described]:
    comments, kinds = _comments(section), section.kinds()
    return [
        Described(
            section.prefix + field.name,
            _type(kinds[field.name]),
            "; ".join(check.must_be for check in kinds[field.name].checks if not check.technical),
            _value(field.default),
            comments.get(field.name, ""),
            kinds[field.name].may_change,
        )
        for field in dataclasses.fields(section)
        if field.name in kinds
    ]


def _type(kind: Kind) -> str:
    noun = _NOUNS[kind.plain]
    return (f"tuple of {noun}" if kind.several else noun) + (" or None" if kind.optional else "")


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comments(section: type[Section]) -> dict[str, str]:
    """Field -> its comment: the one on its line, or the lines of comment right above it."""
    lines = textwrap.dedent(inspect.getsource(section)).splitlines()
    at_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for field in dataclasses.fields(section):
        first = next((n for n, line in enumerate(lines, 1) if line.strip().startswith(f"{field.name}:")), 0)
        above: list[str] = []
        while first - 1 - len(above) in at_line and lines[first - 2 - len(above)].strip().startswith("#"):
            above.insert(0, at_line[first - 1 - len(above)])
        found[field.name] = at_line.get(first) or " ".join(above)
    return found


def for_terminal(read: Sequence[str] | None = None) -> str:
    """Settings with their defaults and meanings, grouped, for `--help`.

    Args:
      read: of a command that takes a run's settings the beginnings of the names that it reads; None: all.
    """
    head = "Settings, each as --config.SECTION.NAME=VALUE; the default stands after the equals sign:"
    if read is not None:
        head = (
            "Settings that this command reads, each as --config.SECTION.NAME=VALUE; as the run has them\n"
            "unless given. The default stands after the equals sign; train --help lists all settings:"
        )
    text = [head]
    for name, meaning, of_section in sections():
        settings = [one for one in of_section if read is None or one.name.startswith(tuple(read))]
        if not settings:
            continue
        text += ["", f"{name}: {meaning}" if name != "run" else "without a section:"]
        for one in settings:
            text.append(f"  {one.name}={one.default}")
            words = " ".join(
                [one.meaning] * bool(one.meaning) + [f"(must be {one.allowed})"] * bool(one.allowed)
            )
            text += textwrap.wrap(words, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(text)


def as_markdown() -> str:
    """docs/settings.md."""
    text = [_HEAD]
    for name, meaning, settings in sections():
        text += [f"\n## {name}\n\n{meaning}\n", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        for one in settings:
            star = " *" if one.may_change else ""
            cells = (f"`{one.name}`{star}", one.type, f"`{one.default}`", one.allowed, one.meaning)
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n"


_COLUMNS = ("setting", "type", "default", "must be", "what it is")
_HEAD = """# Settings

Made by `python -m ngrpo_jax.settings_text`; `ngrpo_jax/settings.py` declares them. On the command line a
setting is `--config.SECTION.NAME=VALUE`; `None` means "not set", switches take `true` and `false`. A resumed
run may change those marked \\*, and no other."""


if __name__ == "__main__":
    print(as_markdown(), end="")
