"""Files on disk: replaced whole, read as JSON or as JSON lines.

Owns how text gets to storage and back. Must not know what a file is about, and must not import JAX, so that
every room can use it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ngrpo_jax.errors import UserError, require, storage

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a JSONL file.

    number: its place in the file, from 1; blank lines count.
    value: what its JSON holds.
    end: bytes of the file up to the end of this line, its newline included.
    """

    number: int
    value: Any
    end: int


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces the file `path` by `text` (UTF-8): a reader finds the old text or the new, never a part.

    Raises:
        UserError, StorageError: as `errors.storage`; the old file is left as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with storage(path, "written"):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """`write_text` of an indented JSON document."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def as_json(value: Any) -> Any:
    """`value` as it is read back from JSON: tuples become lists, and no reference is shared."""
    return json.loads(json.dumps(value))


def read_text(path: pathlib.Path, remedy: str = "save the file as UTF-8") -> str:
    """The text of a file, without a byte order mark; `remedy` ends the sentence where it is not UTF-8.

    Raises:
        UserError: there is no such file, or it is not UTF-8.
        StorageError: the file cannot be read.
    """
    with storage(path):
        content = path.read_bytes()
    with well_formed(path, remedy):
        return content.decode("utf-8-sig")


def read_json(path: pathlib.Path, remedy: str = "correct it or make it again") -> dict[str, Any]:
    """The object that a JSON file holds; errors as of `read_text`, and UserError where it holds none."""
    text = read_text(path, remedy)
    with well_formed(path, remedy):
        value = json.loads(text)
    require(isinstance(value, dict), f"{path} holds no JSON object; {remedy}.")
    return value


def toml_beside(module: str) -> dict[str, Any]:
    """What the TOML file beside a module, with the module's name, holds; `module` is its `__file__`."""
    return tomllib.loads(pathlib.Path(module).with_suffix(".toml").read_text(encoding="utf-8"))


def append_jsonl(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows as JSON lines. The file is closed each time: a mounted bucket gets what is closed.

    Raises:
        UserError, StorageError: as `errors.storage`; the file may end in an unfinished line then.
    """
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with storage(path, "written"), path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_jsonl(path: pathlib.Path, *, unfinished: bool = False) -> Iterator[Line]:
    """The lines of a JSONL file in order; blank lines are passed over.

    Args:
        unfinished: leaves out a last line that has no newline, or that is not JSON where others precede it. A
            process that is killed while it appends to the file leaves such a line.

    Raises:
        UserError: there is no such file, or a line is not JSON; the sentence names the file and the line.
        StorageError: the file cannot be read.
    """
    with storage(path):
        content = path.read_bytes()
    # Not splitlines(): that also cuts at U+2028 and other characters that JSON allows within a string.
    lines = content.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    if unfinished:
        lines.pop()
    end = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    for number, line in enumerate(lines, start=1):
        end += len(line) + 1
        if not line.strip():
            continue
        try:
            with well_formed(f"{path} line {number}", "correct or remove that line"):
                value = json.loads(line.decode("utf-8"))
        except UserError:
            if unfinished and number == len(lines) > 1:  # the only line of a file is no end of an older one
                return
            raise
        yield Line(number, value, min(end, len(content)))


@contextlib.contextmanager
def well_formed(place: str | pathlib.Path, remedy: str) -> Iterator[None]:
    """Turns an error of decoding UTF-8 or JSON inside of the block into one sentence, a UserError."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is {_fault(error)}; {remedy}.") from error


def _fault(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"not UTF-8 text ({error.reason}{f' in line {line}' if line > 1 else ''})"
    if isinstance(error, json.JSONDecodeError):
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        return f"not JSON ({error.msg} at {where})"
    if "integer string conversion" in str(error):
        return f"JSON with a whole number of more than {sys.get_int_max_str_digits()} digits"
    return "JSON nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"
