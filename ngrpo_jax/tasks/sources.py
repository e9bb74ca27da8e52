r"""A data source, given as a string, to numbered rows, each a dict.

Owns the grammar of sources and reads prepared TFDS sets. `files` owns the formats, `builders` the data sets
of this project, `datasets` the fields that a problem needs.

    arithmetic[:terms=3,digits=2,ops=+-]      generated, see `arithmetic`; splits train and test
    jsonl:PATH[?problem=FIELD&answer=FIELD&id=FIELD]
    json:PATH, csv:PATH, parquet:PATH         the same; PATH of parquet may be a folder of files
    tfds:NAME[/CONFIG][?data_dir=DIR&manual_dir=DIR]      one of `builders`; prepared if it is not yet
    tfds:NAME[/CONFIG][:VERSION][?...]        any other TFDS set; it must be prepared as array_record
    package.module:function                   called with split= and seed=; gives dicts

After "?", `problem=`, `answer=` and `id=` name the fields of the file where they have other names, and
`answer_after=TEXT` takes of each answer what follows the last TEXT, such as ####. A.B names the field B of
the object A, and a problem may be a chat of one user turn: files of verl are read by
parquet:F?problem=prompt&answer=reward_model.ground_truth. A file is read whole whatever the split.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

from ngrpo_jax.errors import UserError, explained, require

from . import arithmetic, builders, files
from .importing import import_function
from .rows import Row

FIELDS = ("problem", "answer", "id")
_ANSWER_AFTER = "answer_after"
_KINDS = ("arithmetic", *files.READERS, "tfds")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a source.

    origin: the file or set, for the sentence of an error.
    numbered: (number, row), numbers from 1; can be read once.
    names: the one name in this source of each of `FIELDS`.
    nameable: whether the source may give its fields' names, as a file's does.
    answer_after: the text before the answer within its field; empty where the field is the answer.
    """

    origin: str
    numbered: Iterator[tuple[int, Row]]
    names: dict[str, tuple[str]]
    answer_after: str = ""
    nameable: bool = False


def read_rows(source: str, *, split: str, seed: int, size: int | None) -> Rows:
    """The rows of `source`, read lazily; `size` is the number of rows of a generated source.

    Raises UserError, at once or while the rows are read, in one sentence that names the source and the place.
    """
    kind, _, rest = source.partition(":")
    body, _, query = rest.partition("?")
    if kind == "arithmetic":
        made = arithmetic.generate(arithmetic.parse_spec(rest), split=split, seed=seed, size=size)
        return Rows(kind, enumerate(made, 1), _field_names(source, "")[0])
    if kind in files.READERS and body:
        names, options = _field_names(source, query, (_ANSWER_AFTER,))
        path = pathlib.Path(body).expanduser()
        return Rows(str(path), files.read(path, kind), names, **options, nameable=True)
    if kind == "tfds" and body:
        own = body.partition("/")[0].partition(":")[0] in builders.NAMES
        extra = (_ANSWER_AFTER, "data_dir", *(["manual_dir"] if own else []))
        names, options = _field_names(source, query, extra)
        after = options.pop(_ANSWER_AFTER, "")
        return Rows(f"{kind}:{body} {split}", _tfds_rows(body, split, own, **options), names, after, True)
    if rest and not body.startswith("//"):
        near = difflib.get_close_matches(kind, _KINDS, n=1)
        if near and "." not in kind and importlib.util.find_spec(kind) is None:
            raise UserError(f"unknown kind of data source {source!r}; did you mean {near[0]}:{rest}?")
        given = import_function(source, "the data source")(split=split, seed=seed)
        return Rows(source, enumerate(given, 1), _field_names(source, "")[0])
    known = _nearest(source)
    raise UserError(
        f"unknown data source {source!r}; write arithmetic, jsonl:PATH, json:PATH, csv:PATH, parquet:PATH, "
        f"tfds:NAME or package.module:function{f' (the nearest data set is tfds:{known})' if known else ''}"
    )


def _nearest(name: str) -> str | None:
    """The data set of `builders` whose name is nearest to a wrong name: gpqa_diamond for gpqa."""
    matches = difflib.get_close_matches(name.lower(), builders.NAMES, n=1, cutoff=0.45)
    return matches[0] if matches else None


def _field_names(
    source: str, query: str, extra: tuple[str, ...] = ()
) -> tuple[dict[str, tuple[str]], dict[str, str]]:
    """({field: its one name}, other options) from the part of a source after the question mark."""
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in (*FIELDS, *extra) or not value:
            raise UserError(
                f"data source {source!r}: {key}={value} is not understood; after the question mark write "
                f"{', '.join(f'{name}=...' for name in (*FIELDS, *extra))}, joined by &"
            )
    return {field: (options.pop(field, field),) for field in FIELDS}, options


def _tfds_rows(
    name: str, split: str, own: bool, data_dir: str | None = None, manual_dir: str | None = None
) -> Iterator[tuple[int, Row]]:
    directory = f", data_dir={data_dir!r}" if data_dir else ""
    remedy = (
        'prepare it once with python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{directory}, file_format='array_record').download_and_prepare()\""
    )
    if own:
        set_name, _, version = name.partition(":")
        builder = builders.build(set_name, data_dir=data_dir, manual_dir=manual_dir)
        fits = version in ("", str(builder.version))
        require(fits, f"data set {set_name} is at version {builder.version}, not {version}")
    else:
        builder = _prepared(name, data_dir, remedy)
    fault = f"the TFDS data set {name!r}"
    stored = f"{fault} in {builder.data_dir} is not in the array_record format"
    with (
        explained(NotImplementedError, stored, f"delete it and {remedy}"),
        explained(ValueError, f"{fault} cannot give the split {split!r}", "name another"),
    ):
        rows = builder.as_data_source(split)
    return enumerate((rows[i] for i in range(len(rows))), 1)


def _prepared(name: str, data_dir: str | None, remedy: str) -> Any:
    """The builder of a set that is not in `builders`; UserError where it is unknown or not prepared."""
    import tensorflow_datasets as tfds

    where = data_dir or "the default folder (TFDS_DATA_DIR, or ~/tensorflow_datasets)"
    near = _nearest(name)
    advice = f"the nearest known name is {near}" if near else "check its name and data_dir"
    fault = f"no TFDS data set {name!r}: neither prepared in {where} nor known to tensorflow_datasets"
    with explained(tfds.core.DatasetNotFoundError, fault, advice):
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    require(builder.is_prepared(), f"the TFDS data set {name!r} is not prepared in {where}; {remedy}")
    return builder
