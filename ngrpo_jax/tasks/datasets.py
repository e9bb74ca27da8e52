"""Problems, and the endless stream of them that training draws from.

Owns what a problem is and the order in which problems come. It knows nothing of prompts or tokens.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .sources import FIELDS, Row, read_rows


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem's text, its gold answer, and an id that is unique in its data set."""

    id: str
    problem: str
    answer: str


def load_problems(source: str, *, split: str, seed: int, size: int | None = None) -> list[Problem]:
    """Every problem of a source (its grammar stands in `sources`), in the source's own order.

    Args:
      source: "arithmetic:...", "jsonl:PATH", "parquet:PATH", "tfds:NAME" or "package.module:function".
      split: for the sources that have splits; a file is read whole.
      seed: for the sources that are generated.
      size: at most so many problems, the first ones; "arithmetic" makes just so many.
    Each row needs a text `problem` and an `answer` (text or a number); `id` is optional, by default the
    row's number. Raises ValueError or OSError, naming the file, the row (from 1) and the field at fault.
    """
    if size is not None and size < 1:
        raise ValueError(f"data source {source!r}: {size} problems were asked for; ask for at least 1")
    rows = read_rows(source, split=split, seed=seed, size=size)
    problems: dict[str, Problem] = {}
    for number, row in itertools.islice(rows.numbered, size):
        place = f"{rows.origin}, row {number}"
        problem = _problem(place, f"row-{number}", row, rows.names)
        if problem.id in problems:
            raise ValueError(f"{place}: the id {problem.id!r} stands in an earlier row too; ids must differ")
        problems[problem.id] = problem
    if not problems:
        raise ValueError(f"data source {source!r} (split {split!r}) is empty; give one with at least one row")
    return list(problems.values())


def _problem(place: str, default_id: str, row: Row, names: dict[str, str]) -> Problem:
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: not an object with the fields {names['problem']} and {names['answer']}")
    values = {}
    for field in FIELDS:
        name = names[field]
        value = row.get(name)
        if value is None and field == "id":
            value = default_id
        if value is None:
            there = ", ".join(map(str, row)) or "none"
            raise ValueError(
                f"{place}: no field {name!r}; every row needs a problem and an answer (fields here: {there})"
            )
        values[field] = _text(place, name, value, numbers=field != "problem")
    return Problem(**values)


def _text(place: str, name: str, value: Any, *, numbers: bool) -> str:
    """A field's text; TFDS gives bytes, and answers may be numbers."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: field {name!r} is not UTF-8 text; convert it") from error
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {name!r} is {type(value).__name__}, not text; give it as text")
    if not value.strip():
        raise ValueError(f"{place}: field {name!r} is empty; fill it in or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: field {name!r} holds half a character ({error.reason}); correct it"
        ) from error
    return value


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

    @property
    def epoch(self) -> float:
        """How often the data set has been gone through, over all hosts."""
        return self._position * self._stride / len(self._problems)

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
