"""A data set's file, public or of the user's, to checked rows {id, problem, answer}.

Owns the checks of a set as a whole: fields, ids, row counts, rows left out of a training set. Must not know
the network or TFDS.
"""

import hashlib
import pathlib
from typing import NamedTuple

from ngrpo_jax.errors import require

from .. import cleaning, files, rows
from ..grading.extraction import gold_letter, last_boxed
from .catalogue import CHOICE, OPTIONS, DataSet
from .choices import balanced_letters, lay_out

_FORMATS = tuple(files.READERS)


class SplitRows(NamedTuple):
    """The rows of a split, the licences that they name, and their file's part of the set's metadata.

    The metadata has no path, so that equal files give equal bytes.
    """

    examples: list[dict[str, str]]
    licences: tuple[str, ...]
    metadata: dict[str, str | int]


def own_files(entry: DataSet, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The user's file for each split: by name, or the only data file of the folder; `folder` may be a file.

    Raises UserError where there is no folder, no file, or more than one file for a split.
    """
    main = next(iter(entry.splits))
    if folder.is_file():
        return {main: folder}
    require(folder.is_dir(), f"data set {entry.full_name}: there is no folder {folder}")
    there = sorted(p for p in folder.iterdir() if p.suffix[1:].lower() in _FORMATS and p.is_file())
    found: dict[str, pathlib.Path] = {}
    for split in entry.splits:
        stems = _stems(entry, split)
        mine = [path for path in there if path.stem.lower() in stems]
        require(
            len(mine) <= 1,
            f"data set {entry.full_name}: {rows.some(p.name for p in mine)} in {folder} may each be the "
            f"split {split!r}; leave one of them there",
        )
        if mine:
            found[split] = mine[0]
    if not found and len(there) == 1:
        found[main] = there[0]
    looked = " or ".join(f"{stem}.*" for split in entry.splits for stem in _stems(entry, split))
    require(
        bool(found),
        f"data set {entry.full_name}: {folder} holds no file for it; name it {looked}, as one of "
        f".{', .'.join(_FORMATS)}",
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
    default_id = f"{entry.name}-{{:05d}}"
    reader = rows.RowReader(str(path), entry.fields, entry.full_name, default_id, tolerant=entry.training)
    read = [_example(entry, reader, number, row) for number, row in files.read(path)]
    total, wanted = len(read), entry.splits[split].rows
    require(
        total == wanted or not public,
        f"{path} has {total} rows, but the split {split!r} of {entry.full_name} has {wanted} in its "
        "public source; fetch it again, or give it as a file of your own by manual_dir",
    )
    found = [example for example in read if example]
    _lay_out_options(found)
    again = set(cleaning.repeated([example["problem"] for example in found])) if entry.training else set()
    kept = [example for i, example in enumerate(found) if i not in again]
    require(bool(kept), f"{path} holds no problem; give a file with at least one row")
    licences = tuple(dict.fromkeys(example["licence"] for example in kept if example["licence"]))
    examples = [{name: example[name] for name in ("id", "problem", "answer")} for example in kept]
    metadata: dict[str, str | int] = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows_read": total,
        "nulls_dropped": total - len(found),
        "duplicates_dropped": len(again),
        "problems": len(examples),
    }
    return SplitRows(examples, licences, metadata)


def _example(entry: DataSet, reader: rows.RowReader, number: int, row: rows.Row) -> dict[str, str] | None:
    """A row's texts and its licence; the options of a multiple choice too where they stand in columns.

    None for a row without a problem or an answer in a training set.
    """
    in_columns = entry.kind == CHOICE and reader.find(row, "correct") is not None
    texts = reader.read(number, row, ("problem", *OPTIONS) if in_columns else ("problem", "answer"))
    if texts is None:
        return None
    if entry.kind != CHOICE:
        texts["answer"] = _answer(texts["answer"], reader.find(row, "answer"))
    elif not in_columns:
        require(
            bool(gold_letter(texts["answer"])),
            f"{reader.origin}, row {number}: the answer {texts['answer']!r} is no letter from A to D; give "
            "the letter, or the columns Correct Answer and Incorrect Answer 1 to 3",
        )
    name = rows.find(row, ("licence", "license"))
    return texts | {"licence": "" if name is None or rows.is_null(row[name]) else str(row[name])}


def _lay_out_options(examples: list[dict[str, str]]) -> None:
    """Puts options that stand in columns into the text of their problem; the answer becomes a letter."""
    in_columns = [example for example in examples if OPTIONS[0] in example]
    letters = balanced_letters([example["id"] for example in in_columns])
    for example, letter in zip(in_columns, letters, strict=True):
        right, *wrong = (example[name] for name in OPTIONS)
        example["problem"] = lay_out(example["problem"], right, wrong, letter, example["id"])
        example["answer"] = letter


def _answer(text: str, field: str | None) -> str:
    r"""The answer within a field: after `####` in GSM8K, in the box of the solution in AIME24."""
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    if rows.plain_name(field) == "solution":
        return (last_boxed(text) or text).strip()
    return text.strip()
