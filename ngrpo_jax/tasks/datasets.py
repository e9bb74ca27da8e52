"""Problems, and the endless stream of them for training.

Owns what a problem is and the order of problems. Must not know prompts or tokens.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ngrpo_jax.errors import UserError

from . import cleaning
from .rows import Row, field_list, is_null, text
from .sources import FIELDS, read_rows


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
    if not kept:
        raise UserError(f"data source {source!r} has only rows without a problem or answer; fill them in")
    return TrainingProblems(kept[:size], len(found) - len(problems), len(again))


def _check_size(source: str, size: int | None) -> None:
    if size is not None and size < 1:
        raise UserError(f"data source {source!r}: the number of problems is {size}; it must be at least 1")


def _problems(
    source: str, split: str, seed: int, size: int | None, *, tolerant: bool
) -> Iterator[Problem | None]:
    """A problem for each row; where tolerant, None for a row without a problem or an answer."""
    rows = read_rows(source, split=split, seed=seed, size=size)
    ids: set[str] = set()
    empty = True
    for number, row in rows.numbered:
        empty = False
        place = f"{rows.origin}, row {number}"
        problem = _problem(place, f"row-{number}", row, rows.names, tolerant)
        if problem is not None:
            if problem.id in ids:
                raise UserError(f"{place}: an earlier row has the id {problem.id!r} too; ids must differ")
            ids.add(problem.id)
        yield problem
    if empty:
        raise UserError(f"data source {source!r} (split {split!r}) is empty; give one with at least one row")


def _problem(place: str, default_id: str, row: Row, names: dict[str, str], tolerant: bool) -> Problem | None:
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: not an object with the fields {names['problem']} and {names['answer']}")
    values = {}
    for field in FIELDS:
        name = names[field]
        value = row.get(name)
        if field == "id" and is_null(value):
            value = default_id
        elif tolerant and name in row and is_null(value):
            return None
        if value is None:
            raise UserError(
                f"{place}: no field {name!r}; every row needs a problem and an answer (fields here: "
                f"{field_list(row)})"
            )
        values[field] = text(place, name, value, numbers=field != "problem")
    return Problem(**values)


class ProblemStream(Iterator[list[Problem]]):
    """Endless batches of problems in an order that the seed alone decides.

    Each epoch is a new shuffle and holds every problem once; batches run on across the end of an epoch, so
    none is ever short. Host h of H takes every H-th problem of that one order, beginning with the h-th:
    together the hosts' batches number n are the order's next `batch`·H problems.

    Args:
      problems: the data set, the same on every host.
      batch: problems a batch on this host.
      seed: of the order, from 0 to 2^32 - 1.
      host, hosts: this host's number and how many there are.
    """

    def __init__(self, problems: Sequence[Problem], *, batch: int, seed: int, host: int = 0, hosts: int = 1):
        import grain

        if not problems:
            raise ValueError("a stream of problems needs at least one problem")
        if batch < 1 or not 0 <= host < hosts:
            raise ValueError(
                f"a stream needs a batch of at least 1 and 0 <= host < hosts, not {batch}, {host}, {hosts}"
            )
        self._problems = list(problems)
        self._batch, self._stride = batch, batch * hosts
        # Random access, no iterator: a position is the whole state, and no thread reads ahead.
        self._order = grain.MapDataset.range(len(self._problems)).seed(seed).shuffle().repeat()[host::hosts]
        self._position = 0
        content = json.dumps([seed, *(dataclasses.astuple(problem) for problem in self._problems)])
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def __next__(self) -> list[Problem]:
        start = self._position * self._batch
        self._position += 1
        return [self._problems[int(self._order[start + i])] for i in range(self._batch)]

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on exactly here; plain values, the same on every host."""
        return {"taken": self._position * self._stride, "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, even with other numbers of hosts and problems a batch.

        Raises ValueError where the data set or the seed is another, or where the place is in the middle of
        a batch of today's size.
        """
        if state["data"] != self._fingerprint:
            raise ValueError(
                "the problems or their seed have changed since the checkpoint was written; resume with the "
                "same, or start in a new workdir"
            )
        position, rest = divmod(state["taken"], self._stride)
        if rest:
            raise ValueError(
                f"the checkpoint was written after {state['taken']} problems, no whole number of batches of "
                f"{self._stride}; resume with the batch size that it was trained with"
            )
        self._position = position
