"""The numbers of a run, on disk: one JSON object a step, and TensorBoard event files of the same.

Owns WORKDIR/metrics.jsonl and WORKDIR/tensorboard. Must not know what any metric means.

Names are `group/name`. Times go under `time/` (seconds), rates under `speed/` (units a second) and bytes
under `memory/`, and nothing else does: without these three groups, the file of a run that was stopped and
resumed is byte for byte that of a run that was not.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from ngrpo_jax.errors import UserError

from . import files

VARYING_GROUPS = ("time/", "speed/", "memory/")  # what differs between runs that compute the same


class MetricsWriter:
    """Appends the metrics of each step, flushed at once.

    Args:
        workdir: made if it is not there.
        resume_step: the step of the checkpoint that the run goes on from; rows of later steps, which the
            run is about to make again, are cut away. None starts anew and drops all rows.
        primary: whether this process writes; the others' calls do nothing.

    Raises:
        ValueError: metrics.jsonl has a line, other than an unfinished last one, that is no row of metrics.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, resume_step: int | None = None, primary: bool = True
    ):
        self._last = -1 if resume_step is None else resume_step
        self._file = self._events = None
        if not primary:
            return
        directory = Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        _cut(path, self._last)
        self._file = path.open("a", encoding="utf-8")
        events = directory / "tensorboard"
        # Files are named by the second: a number keeps two attempts within one from being the same file.
        suffix = f".{sum(1 for _ in events.glob('*tfevents*'))}"
        # TensorBoard drops the events of an earlier attempt from the purge step on.
        self._events = SummaryWriter(str(events), purge_step=self._last + 1, filename_suffix=suffix)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row `{"step": step, ...}`; a value that is not finite becomes null.

        Args:
            step: larger than any written before.
            metrics: numbers, or NumPy or JAX arrays of one element.

        Raises:
            ValueError: the step is not new, or a value is not one number (the key is named).
        """
        if step <= self._last:
            raise ValueError(
                f"metrics of step {step} come after those of step {self._last}; steps must advance"
            )
        row = {key: scalar(key, value) for key, value in metrics.items()}
        self._last = step
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in row.items():
            if value is not None:
                self._events.add_scalar(key, value, step)
        self._events.flush()

    def close(self) -> None:
        """Closes both files; calling it again does nothing."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()
        self._file = self._events = None


class JsonLines:
    """Appends rows that carry a `step`, such as sample responses; a resumed run's later rows are cut away.

    Args: as of MetricsWriter, but for the file's own path.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None, primary: bool = True):
        self._file = None
        path = Path(path)
        if primary:
            _cut(path, -1 if resume_step is None else resume_step)
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows, flushed at once."""
        if self._file is not None:
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self._file.flush()


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; an unfinished last line (a killed process) is left out.

    Raises:
        ValueError: another line is not an object with an integer `step`; file and line are named.
        FileNotFoundError: there is no such file.
    """
    return [row for row, _ in _rows(Path(path))]


def scalar(key: str, value: Any) -> int | float | None:
    """`value` as a JSON number, None where it is not finite.

    Raises:
        ValueError: it is not one number; `key` is named.
    """
    array = np.asarray(value)
    if array.size != 1 or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"metric {key!r} is {value!r}; a metric is one number")
    number = array.item()
    if isinstance(number, int):
        return int(number)
    return float(number) if math.isfinite(number) else None


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    # Not splitlines(): it also cuts at U+2028 and other characters that JSON leaves as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    # What follows the last newline is unfinished, or empty.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg}); remove that line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path} line {number} is no object with a `step`; remove that line")
        rows.append((row, line))
    return rows


def _cut(path: Path, last: int) -> None:
    """Rewrites the file without the rows after step `last`, in one atomic replacement."""
    if not path.exists():
        return
    kept = [line for row, line in _rows(path) if row["step"] <= last]
    files.write_text(path, "".join(line + "\n" for line in kept))
