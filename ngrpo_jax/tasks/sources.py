r"""Where rows come from: a source string to numbered rows, each a dict.

Owns file formats and TFDS, and nothing of what a problem must have: `datasets` checks that.

    arithmetic[:terms=3,digits=2,ops=+-]      generated, see `arithmetic`; splits train and test
    jsonl:PATH[?problem=FIELD&answer=FIELD&id=FIELD]
    parquet:PATH[?...]                        a file, or a folder of them
    tfds:NAME[/CONFIG][:VERSION][?...]        prepared as array_record; also ?data_dir=DIR
    package.module:function                   called with split= and seed=, gives dicts

The part after "?" names the fields that hold the problem, its answer and its id, where they are called
otherwise; files are read whole whatever the split.
"""

import dataclasses
import json
import pathlib
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from . import arithmetic
from .importing import import_function

Row = Mapping[str, Any]
FIELDS = ("problem", "answer", "id")


@dataclasses.dataclass(frozen=True)
class Rows:
    """`numbered` gives (number, row), numbers from 1, once; `names` says what `FIELDS` are called in it."""

    origin: str
    numbered: Iterator[tuple[int, Row]]
    names: dict[str, str]


def read_rows(source: str, *, split: str, seed: int, size: int | None) -> Rows:
    """The rows of `source`, read as they are asked for.

    `size` only tells a generated source how many to make. Raises ValueError or OSError, at once or while
    the rows are read, in one sentence that names the source and the place.
    """
    kind, _, rest = source.partition(":")
    body, _, query = rest.partition("?")
    if kind == "arithmetic":
        made = arithmetic.generate(arithmetic.parse_spec(rest), split=split, seed=seed, size=size)
        return Rows(kind, enumerate(made, 1), _field_names(source, "")[0])
    if kind in ("jsonl", "parquet", "tfds") and body:
        names, options = _field_names(source, query, ("data_dir",) if kind == "tfds" else ())
        if kind == "tfds":
            return Rows(f"{kind}:{body} {split}", _tfds_rows(body, split, options.get("data_dir")), names)
        path = pathlib.Path(body).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"data source {source!r}: there is no file {path}")
        return Rows(str(path), _jsonl_rows(path) if kind == "jsonl" else _parquet_rows(path), names)
    if rest and not body.startswith("//"):
        given = import_function(source, "the data source")(split=split, seed=seed)
        return Rows(source, enumerate(given, 1), _field_names(source, "")[0])
    raise ValueError(
        f"unknown data source {source!r}; write arithmetic, jsonl:PATH, parquet:PATH, tfds:NAME or "
        "package.module:function"
    )


def _field_names(
    source: str, query: str, extra: tuple[str, ...] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """({field: name}, other options) of what follows the question mark of a source."""
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in (*FIELDS, *extra) or not value:
            raise ValueError(
                f"data source {source!r}: {key}={value} is not understood; after the question mark stand "
                f"{', '.join(f'{name}=...' for name in (*FIELDS, *extra))}, joined by &"
            )
    return {field: options.pop(field, field) for field in FIELDS}, options


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    # Not splitlines(), which also splits at U+2028 and other characters that JSON allows in strings.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        place = f"{path}, row {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); correct the row"
            ) from error
        yield number, row


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a readable parquet file ({reason}); fetch it again") from error
    return enumerate((row for batch in table.to_batches() for row in batch.to_pylist()), 1)


def _tfds_rows(name: str, split: str, data_dir: str | None) -> Iterator[tuple[int, Row]]:
    import tensorflow_datasets as tfds

    where = data_dir or "the default folder (TFDS_DATA_DIR, or ~/tensorflow_datasets)"
    directory = f", data_dir={data_dir!r}" if data_dir else ""
    remedy = (
        'prepare it once with python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{directory}, file_format='array_record').download_and_prepare()\""
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"no TFDS data set {name!r}: neither prepared in {where} nor known to tensorflow_datasets; "
            "check its name and data_dir"
        ) from error
    if not builder.is_prepared():
        raise ValueError(f"the TFDS data set {name!r} is not prepared in {where}; {remedy}")
    try:
        rows = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"the TFDS data set {name!r} in {where} is not in the array_record format; delete it and {remedy}"
        ) from error
    except ValueError as error:
        raise ValueError(f"the TFDS data set {name!r} cannot give the split {split!r}: {error}") from error
    return enumerate((rows[i] for i in range(len(rows))), 1)
