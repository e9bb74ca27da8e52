"""A data set's file, public or of the user's, to checked rows {id, problem, answer}.

Owns the checks of a set as a whole: fields, ids, row counts, rows left out of a training set. Must not know
the network or TFDS.
"""

import dataclasses
import hashlib
import pathlib

from ngrpo_jax.errors import UserError

from .. import cleaning, files, rows
from ..grading import gold_letter, last_boxed
from .catalogue import CHOICE, DataSet
from .choices import balanced_letters, lay_out

_FORMATS = tuple(files.READERS)


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """The rows of a split, and counts of the rows of its file."""

    examples: list[dict[str, str]]
    file: str
    sha256: str
    read: int
    nulls: int
    duplicates: int
    licences: tuple[str, ...]  # named by the rows themselves

    def metadata(self) -> dict[str, str | int]:
        """The file's part of the set's metadata; it has no path, so that equal files give equal bytes."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "rows_read": self.read,
            "nulls_dropped": self.nulls,
            "duplicates_dropped": self.duplicates,
            "problems": len(self.examples),
        }


def own_files(entry: DataSet, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The user's file for each split: by name, or the only data file of the folder; `folder` may be a file.

    Raises UserError where there is no folder, no file, or more than one file for a split.
    """
    main = next(iter(entry.splits))
    if folder.is_file():
        return {main: folder}
    if not folder.is_dir():
        raise UserError(f"data set {entry.full_name}: there is no folder {folder}")
    there = sorted(p for p in folder.iterdir() if p.suffix[1:].lower() in _FORMATS and p.is_file())
    found: dict[str, pathlib.Path] = {}
    for split in entry.splits:
        stems = _stems(entry, split)
        mine = [path for path in there if path.stem.lower() in stems]
        if len(mine) > 1:
            raise UserError(
                f"data set {entry.full_name}: {rows.some(p.name for p in mine)} in {folder} may each be the "
                f"split {split!r}; leave one of them there"
            )
        if mine:
            found[split] = mine[0]
    if not found and len(there) == 1:
        found[main] = there[0]
    if not found:
        looked = " or ".join(f"{stem}.*" for split in entry.splits for stem in _stems(entry, split))
        raise UserError(
            f"data set {entry.full_name}: {folder} holds no file for it; name it {looked}, as one of "
            f".{', .'.join(_FORMATS)}"
        )
    return found


def _stems(entry: DataSet, split: str) -> tuple[str, ...]:
    """The names that a file of the split may have, without the suffix."""
    base = entry.name if entry.config == "main" else f"{entry.name}_{entry.config}"
    public = pathlib.PurePath(entry.splits[split].path).stem.lower()
    alone = (base,) if split == next(iter(entry.splits)) else ()
    return tuple(dict.fromkeys([*alone, f"{base}_{split}", split, *([public] if public else [])]))


def read_split(entry: DataSet, split: str, path: pathlib.Path, *, public: bool) -> SplitRows:
    """The rows of a file, checked; a `public` one must have the row count of the catalogue.

    Raises UserError with one sentence that names the file, the row and the field.
    """
    read = _choice_rows if entry.kind == CHOICE else _math_rows
    found, nulls = read(entry, path)
    total, wanted = len(found) + nulls, entry.splits[split].rows
    if public and total != wanted:
        raise UserError(
            f"{path} has {total} rows, but the split {split!r} of {entry.full_name} has {wanted} in its "
            "public source; fetch it again, or give it as a file of your own by manual_dir"
        )
    again = set(cleaning.repeated([example["problem"] for example in found])) if entry.training else set()
    kept = [example for i, example in enumerate(found) if i not in again]
    if not kept:
        raise UserError(f"{path} holds no problem; give a file with at least one row")
    licences = tuple(dict.fromkeys(example["licence"] for example in kept if example["licence"]))
    examples = [{name: example[name] for name in ("id", "problem", "answer")} for example in kept]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return SplitRows(examples, path.name, digest, total, nulls, len(again), licences)


def _math_rows(entry: DataSet, path: pathlib.Path) -> tuple[list[dict[str, str]], int]:
    """(rows, number of rows left out because they have no problem or no answer)."""
    found: list[dict[str, str]] = []
    nulls, ids = 0, _Ids(entry, path)
    for number, row in files.read(path):
        fields = _fields(entry, path, number, row, ("problem", "answer"))
        if entry.training and any(rows.is_null(row[name]) for name in fields.values()):
            nulls += 1
            continue
        value = _texts(path, number, row, fields)
        value["answer"] = _answer(value["answer"], fields["answer"])
        found.append(value | {"id": ids.take(number, row), "licence": _licence(row)})
    return found, nulls


def _choice_rows(entry: DataSet, path: pathlib.Path) -> tuple[list[dict[str, str]], int]:
    """(rows, 0). Options in columns are put into the text; rows whose answer is a letter stay as they are."""
    found: list[dict[str, str]] = []
    options: list[dict[str, str]] = []
    ids = _Ids(entry, path)
    parts = ("problem", "correct", "wrong1", "wrong2", "wrong3")
    for number, row in files.read(path):
        laid_out = isinstance(row, dict) and rows.find(row, entry.fields["correct"]) is None
        fields = _fields(entry, path, number, row, ("problem", "answer") if laid_out else parts)
        value = _texts(path, number, row, fields) | {"licence": _licence(row)}
        value["id"] = ids.take(number, row)
        if laid_out and not gold_letter(value["answer"]):
            raise UserError(
                f"{path}, row {number}: the answer {value['answer']!r} is no letter from A to D; give the "
                "letter, or the columns Correct Answer and Incorrect Answer 1 to 3"
            )
        (found if laid_out else options).append(value)
    letters = balanced_letters([value["id"] for value in options])
    for value, letter in zip(options, letters, strict=True):
        wrong = [value.pop(f"wrong{i}") for i in (1, 2, 3)]
        right = value.pop("correct")
        value["problem"] = lay_out(value["problem"], right, wrong, letter, value["id"])
        value["answer"] = letter
    return found + options, 0


class _Ids:
    """The ids of a file, which must differ."""

    def __init__(self, entry: DataSet, path: pathlib.Path):
        self._entry, self._path = entry, path
        self._rows: dict[str, int] = {}

    def take(self, number: int, row: rows.Row) -> str:
        """The row's id, by default the set's name and the row's number; UserError for a repeated id."""
        name = rows.find(row, self._entry.fields["id"])
        if name is None or rows.is_null(row[name]):
            taken = f"{self._entry.name}-{number:05d}"
        else:
            taken = rows.text(f"{self._path}, row {number}", name, row[name], numbers=True)
        earlier = self._rows.setdefault(taken, number)
        if earlier != number:
            raise UserError(
                f"{self._path}, row {number}: row {earlier} has the id {taken!r} too; ids must differ"
            )
        return taken


def _fields(
    entry: DataSet, path: pathlib.Path, number: int, row: rows.Row, wanted: tuple[str, ...]
) -> dict[str, str]:
    """The row's name of each wanted field; UserError for a field that is missing."""
    if not isinstance(row, dict):
        raise UserError(f"{path}, row {number}: not an object with the fields problem and answer")
    names = {field: rows.find(row, entry.fields[field]) for field in wanted}
    for field, name in names.items():
        if name is None:
            first, *others = entry.fields[field]
            also = f" (or {', '.join(others)})" if others else ""
            raise UserError(
                f"{path}, row {number}: no field {first!r}{also}, which {entry.full_name} needs (fields "
                f"here: {rows.field_list(row)})"
            )
    return {field: name for field, name in names.items() if name is not None}


def _texts(path: pathlib.Path, number: int, row: rows.Row, fields: dict[str, str]) -> dict[str, str]:
    place = f"{path}, row {number}"
    return {
        field: rows.text(place, name, row[name], numbers=field != "problem") for field, name in fields.items()
    }


def _licence(row: rows.Row) -> str:
    name = rows.find(row, ("licence", "license"))
    return "" if name is None or rows.is_null(row[name]) else str(row[name])


def _answer(text: str, field: str) -> str:
    r"""The answer within a field: after `####` in GSM8K, in the box of the solution in AIME24."""
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    if rows.plain_name(field) == "solution":
        return (last_boxed(text) or text).strip()
    return text.strip()
