"""The data sets of the paper and GSM8K: the repository of each, its row count, the names of its fields.

Plain data. Every public file is pinned to a commit, so that its row count stays right.
"""

import dataclasses
from collections.abc import Mapping

MATH, CHOICE = "math", "choice"

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
    repository: str | None
    revision: str | None
    splits: Mapping[str, PublicFile]
    licence: str
    kind: str = MATH
    config: str = "main"
    training: bool = False  # leaves out rows without a problem or answer, and repeated problems
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: _FIELDS)

    @property
    def full_name(self) -> str:
        """As after `tfds:` in a source."""
        return self.name if self.config == "main" else f"{self.name}/{self.config}"


CATALOGUE = (
    DataSet(
        name="deepscaler",
        title="DeepScaleR-Preview: competition problems up to 2023 (AIME, AMC, Omni-MATH, Still)",
        repository="agentica-org/DeepScaleR-Preview-Dataset",
        revision="b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
        splits={"train": PublicFile("deepscaler.json", 40_315)},
        licence="MIT",
        training=True,
    ),
    DataSet(
        name="deepscaler",
        config="subset",
        title="A part of DeepScaleR-Preview, chosen by the user",
        repository=None,
        revision=None,
        splits={"train": PublicFile("", 0)},
        licence="MIT, as the whole",
        training=True,
    ),
    DataSet(
        name="aime24",
        title="American Invitational Mathematics Examination 2024, I and II",
        repository="math-ai/aime24",
        revision="83a7f387baaa524a8bda0022eac0541582297103",
        splits={"test": PublicFile("test-00000-of-00001.parquet", 30)},
        licence="Apache-2.0; problems by the Mathematical Association of America",
    ),
    DataSet(
        name="aime25",
        title="American Invitational Mathematics Examination 2025, I and II",
        repository="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        splits={"test": PublicFile("test.jsonl", 30)},
        licence="Apache-2.0; problems by the Mathematical Association of America",
    ),
    DataSet(
        name="amc23",
        title="American Mathematics Competitions 2023, 12A and 12B, those with a number as their answer",
        repository="math-ai/amc23",
        revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
        splits={"test": PublicFile("test-00000-of-00001.parquet", 40)},
        licence="Apache-2.0; problems by the Mathematical Association of America",
    ),
    DataSet(
        name="math500",
        title="500 problems of the MATH test set (Hendrycks et al.), chosen by Lightman et al.",
        repository="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        splits={"test": PublicFile("test.jsonl", 500)},
        licence="MIT",
    ),
    DataSet(
        name="gsm8k",
        title="GSM8K: grade-school word problems (Cobbe et al.)",
        repository="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        splits={
            "test": PublicFile("main/test-00000-of-00001.parquet", 1319),
            "train": PublicFile("main/train-00000-of-00001.parquet", 7473),
        },
        licence="MIT",
    ),
    DataSet(
        name="gpqa_diamond",
        title="GPQA Diamond: graduate-level science questions with four choices (Rein et al.)",
        repository="Idavidrein/gpqa",
        revision=None,  # gated: no commit of it could be checked
        splits={"test": PublicFile("gpqa_diamond.csv", 198)},
        licence="CC-BY-4.0; its authors request that no question be shown in plain text on the net",
        kind=CHOICE,
        fields=_CHOICE_FIELDS,
    ),
)

NAMES = tuple(dict.fromkeys(entry.name for entry in CATALOGUE))


def configs(name: str) -> dict[str, DataSet]:
    """The configurations of a data set by name, the default one first."""
    return {entry.config: entry for entry in CATALOGUE if entry.name == name}
