"""Problems of a data source, and their order in training.

Owns what a problem is, and which problems a training step takes. Must not know prompts or tokens.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np

from ngrpo_jax.errors import require

from . import cleaning
from .rows import RowReader, opened
from .sources import read_rows


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem's text, its gold answer, and an id that is unique in its data set."""

    id: str
    problem: str
    answer: str


@dataclasses.dataclass(frozen=True)
class TrainingProblems:
    """The problems of a training set, and how many rows were left out of it."""

    problems: list[Problem]
    nulls: int  # rows without a problem or an answer
    duplicates: int  # rows whose problem is that of an earlier row, white space aside


def load_problems(source: str, *, split: str, seed: int, size: int | None = None) -> list[Problem]:
    """Every problem of a source (`sources` has the grammar), in the source's order.

    Args:
      source: "arithmetic:...", "jsonl:PATH", "json:PATH", "csv:PATH", "parquet:PATH", "tfds:NAME" or
        "package.module:function".
      split: used by sources that have splits; a file is read whole.
      seed: used by generated sources.
      size: keeps the first `size` problems; "arithmetic" generates that many.
    Each row needs a text `problem` and an `answer` (text or a number); `id` is optional, by default the
    row's number. Raises UserError, naming the file, the row (from 1) and the field.
    """
    _check_size(source, size)
    found = _problems(source, split, seed, size, tolerant=False)
    return list(itertools.islice((problem for problem in found if problem), size))


def load_training(
    source: str, *, split: str = "train", seed: int, size: int | None = None
) -> TrainingProblems:
    """`load_problems` without the rows that lack a problem or an answer, and without repeated problems."""
    _check_size(source, size)
    found = list(_problems(source, split, seed, size, tolerant=True))
    problems = [problem for problem in found if problem]
    again = set(cleaning.repeated([problem.problem for problem in problems]))
    kept = [problem for i, problem in enumerate(problems) if i not in again]
    require(bool(kept), f"data source {source!r} has only rows without a problem or answer; fill them in")
    return TrainingProblems(kept[:size], len(found) - len(problems), len(again))


def _check_size(source: str, size: int | None) -> None:
    fault = f"data source {source!r}: the number of problems is {size}; it must be at least 1"
    require(size is None or size >= 1, fault)


def _problems(
    source: str, split: str, seed: int, size: int | None, *, tolerant: bool
) -> Iterator[Problem | None]:
    """A problem for each row; where tolerant, None for a row without a problem or an answer."""
    rows = read_rows(source, split=split, seed=seed, size=size)
    named = source if rows.nameable else ""
    reader = RowReader(rows.origin, rows.names, "every row", "row-{}", tolerant, named, spelling=str)
    number = 0
    for number, row in rows.numbered:
        place = f"{rows.origin}, row {number}"
        texts = reader.read(number, opened(place, row, (name for (name,) in rows.names.values())))
        if texts and rows.answer_after:
            texts["answer"] = _after(place, texts["answer"], rows.answer_after)
        yield Problem(**texts) if texts else None
    require(number > 0, f"data source {source!r} (split {split!r}) is empty; give one with at least one row")


def _after(place: str, answer: str, marker: str) -> str:
    """What follows the last `marker` of an answer."""
    result = answer.rpartition(marker)[2].strip() if marker in answer else ""
    require(bool(result), f"{place}: no answer after {marker!r}; correct the row, or leave answer_after out")
    return result


def problem_order(count: int, *, seed: int, step: int, batch: int) -> np.ndarray:
    """Which of `count` problems training step `step` (from 1) takes: int64 [batch], from the arguments alone.

    One epoch follows another, each a permutation of its own that holds every problem once. Batches run on
    across the end of an epoch, so that none is ever short.
    """
    epochs, positions = np.divmod(np.arange((step - 1) * batch, step * batch), count)
    orders = {epoch: epoch_order(count, seed, epoch) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][position] for epoch, position in zip(epochs, positions, strict=True)])


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `count` problems in an epoch (from 0), int64 [count]; equal for all NumPy versions.

    The problems are sorted by 64-bit numbers of Philox-4x64-10 (Salmon et al., 2011) with key (seed, epoch).
    NumPy guarantees the stream of this bit generator, but not the results of `Generator.permutation`, which
    may change between releases: a resumed run would then train on other problems.
    """
    numbers = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(numbers, kind="stable")


def fingerprint(problems: Sequence[Problem], seed: int) -> str:
    """16 hexadecimal digits that differ where the problems, their order in the data set or the seed do."""
    content = json.dumps([seed, *(dataclasses.astuple(problem) for problem in problems)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
