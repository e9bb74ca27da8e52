"""The data sets of the paper and GSM8K: the repository of each, its row count, the names of its fields.

catalogue.toml holds the data sets; this file gives them their types.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngrpo_jax.files import toml_beside

MATH, CHOICE = "math", "choice"
OPTIONS = ("correct", "wrong1", "wrong2", "wrong3")  # fields of a multiple choice whose options are columns

_FIELDS = {
    "id": ("id", "unique_id", "Record ID"),
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "solution"),
}
_CHOICE_FIELDS = {
    **_FIELDS,
    "answer": ("answer",),
    "correct": ("Correct Answer",),
    **{f"wrong{i}": (f"Incorrect Answer {i}",) for i in (1, 2, 3)},
}


@dataclasses.dataclass(frozen=True)
class PublicFile:
    """A file of a Hugging Face data set repository, and how many rows it has."""

    path: str
    rows: int


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One configuration of a data set.

    fields: for each field of a problem the names that a file may give it. The first name that the file has is
        used; case and punctuation do not count.
    repository: None where there is no public file.
    """

    name: str
    title: str
    licence: str
    splits: Mapping[str, PublicFile]
    fields: Mapping[str, tuple[str, ...]]
    repository: str | None = None
    revision: str | None = None
    kind: str = MATH
    config: str = "main"
    training: bool = False  # leaves out rows without a problem or answer, and repeated problems

    @property
    def full_name(self) -> str:
        """As after `tfds:` in a source."""
        return self.name if self.config == "main" else f"{self.name}/{self.config}"


def _data_set(entry: dict[str, Any]) -> DataSet:
    splits = {split: PublicFile(**file) for split, file in entry.pop("splits").items()}
    fields = _CHOICE_FIELDS if entry.get("kind") == CHOICE else _FIELDS
    return DataSet(**entry, splits=splits, fields=fields)


CATALOGUE = tuple(map(_data_set, toml_beside(__file__)["data_set"]))

NAMES = tuple(dict.fromkeys(entry.name for entry in CATALOGUE))


def configs(name: str) -> dict[str, DataSet]:
    """The configurations of a data set by name, the default one first."""
    return {entry.config: entry for entry in CATALOGUE if entry.name == name}
