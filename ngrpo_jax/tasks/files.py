"""Data files to numbered rows: JSONL, JSON, CSV, Parquet.

Owns the formats; must not know which fields a row needs. Every reader gives (number, row), numbers from 1,
and raises UserError with one sentence that names the file and, where there is one, the row.
"""

import csv
import io
import json
import pathlib
from collections.abc import Callable, Iterator

from ngrpo_jax.errors import UserError, explained, require
from ngrpo_jax.files import read_jsonl, read_text, well_formed

from .rows import Row

Numbered = Iterator[tuple[int, Row]]


def read(path: pathlib.Path, kind: str | None = None) -> Numbered:
    """The rows of a file; `kind` is a key of `READERS`, by default the file's suffix.

    Raises UserError where there is no such file, and for a suffix that is no format.
    """
    kind = kind or path.suffix.removeprefix(".").lower()
    suffixes = ", .".join(READERS)
    require(kind in READERS, f"{path} is no data file by its suffix; its suffix must be .{suffixes}")
    require(path.exists(), f"there is no file {path}")
    return READERS[kind](path)


def _jsonl(path: pathlib.Path) -> Numbered:
    return ((line.number, line.value) for line in read_jsonl(path))


def _json(path: pathlib.Path) -> Numbered:
    """An array of objects; a file that holds JSON lines in spite of its suffix is read as JSONL."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return _jsonl(path)
    with well_formed(path, "correct it"):
        return enumerate(json.loads(text), 1)


def _csv(path: pathlib.Path) -> Numbered:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        for number, cells in enumerate(filter(None, reader), 1):
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, row {number}: {len(cells)} fields where the header has {len(header)}; "
                    "put fields that hold commas or line breaks in quotes"
                )
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}); correct it") from error


def _parquet(path: pathlib.Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    with explained(pyarrow.ArrowInvalid, f"{path} is not a readable parquet file", "fetch it again"):
        table = pyarrow.parquet.read_table(path)
    number = 0
    for batch in table.to_batches():
        place = f"{path}: among rows {number + 1} to {number + batch.num_rows}"
        with explained(UnicodeDecodeError, f"{place} there is text that is not UTF-8", "write the file anew"):
            rows = batch.to_pylist()
        yield from enumerate(rows, number + 1)
        number += batch.num_rows


READERS: dict[str, Callable[[pathlib.Path], Numbered]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}
