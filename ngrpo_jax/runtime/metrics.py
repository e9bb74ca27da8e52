"""What a run writes as it goes: metrics.jsonl, samples.jsonl, evaluations.jsonl, and to its loggers.

Owns these files, and restarts.jsonl, which has a row for each time that the run was resumed. Must not know
what any metric means.

Names of metrics are `group/name`. Times go under `time/` (seconds), rates under `speed/` (units a second) and
bytes under `memory/`, and nothing else does: without these three groups, the metrics.jsonl of a run that was
stopped and resumed is byte for byte that of a run that was not.
"""

import contextlib
import datetime
import math
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np

from ngrpo_jax import files
from ngrpo_jax.errors import UserError, storage
from ngrpo_jax.runtime.loggers import LOGGERS, Logger

VARYING_GROUPS = ("time/", "speed/", "memory/")  # what differs between runs that compute the same


class RunLog:
    """Writes each step's metrics and sample responses, on disk when `write` returns.

    Args:
        workdir: made if it is not there.
        resume_step: the step of the checkpoint that the run is resumed from; rows of later steps, which the
            run makes again, are cut away. None: a new run, which drops all rows.
        loggers: names of further destinations of the metrics, keys of `LOGGERS`.
        primary: whether this process writes; calls of the other processes only check their arguments.

    Raises:
        UserError: a file has a line, other than an unfinished last one, that is no row of a step.
        StorageError: a file cannot be written, here and in `write`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        loggers: Collection[str] = (),
        primary: bool = True,
    ):
        self._last = -1 if resume_step is None else resume_step
        self._primary = primary
        self._loggers: list[Logger] = []
        folder = pathlib.Path(workdir)
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.jsonl"
        self._evaluations, restarts = folder / "evaluations.jsonl", folder / "restarts.jsonl"
        if not primary:
            return
        with storage(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
        for path in (self._metrics, self._samples, self._evaluations, restarts):
            _cut(path, self._last)
        if resume_step is not None:
            _warn_of_gaps(self._metrics, resume_step)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            files.append_jsonl(restarts, [{"step": resume_step, "time": now}])
        self._loggers = [LOGGERS[name](folder, self._last + 1) for name in loggers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)

    def write(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Writes one row `{"step": step, ...}` of metrics, and the rows of sample responses.

        Args:
            step: larger than any written before.
            metrics: numbers, or NumPy or JAX arrays of one element; what is not finite becomes null.
            samples: JSON-able rows that hold the `step`.

        Raises:
            ValueError: the step is not new, or a metric is not one number (it is named).
        """
        if step <= self._last:
            raise ValueError(
                f"metrics of step {step} come after those of step {self._last}; steps must advance"
            )
        row = scalars(metrics)
        self._last = step
        if not self._primary:
            return
        files.append_jsonl(self._metrics, [{"step": step, **row}])
        files.append_jsonl(self._samples, samples)
        for logger in self._loggers:
            logger.write(step, row, samples)

    def write_evaluation(self, step: int, row: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Writes a row `{"step": step, ...}` of evaluations.jsonl, and these metrics to the loggers.

        Nothing where the file has a row of this step: a run that is resumed at its last step evaluates again.

        Args:
            row: JSON-able.
            metrics: what no row of metrics.jsonl holds of this evaluation, which may be nothing.
        """
        if not self._primary:
            return
        if self._evaluations.exists() and any(r["step"] == step for r in read_rows(self._evaluations)):
            return
        files.append_jsonl(self._evaluations, [{"step": step, **row}])
        for logger in self._loggers if metrics else ():
            logger.write(step, metrics)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or evaluations.jsonl in order, without an unfinished last line.

    Raises:
        UserError: there is no such file, or another line is not an object with an integer `step`.
    """
    return [line.value for line in _rows(pathlib.Path(path))]


def scalars(metrics: Mapping[str, Any]) -> dict[str, int | float | None]:
    """Metrics as they are written: `scalar` of each."""
    return {name: scalar(name, value) for name, value in metrics.items()}


def scalar(name: str, value: Any) -> int | float | None:
    """`value` as a JSON number, None where it is not finite. ValueError, with `name`, for other values."""
    array = np.asarray(value)
    if array.size != 1 or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"metric {name!r} is {value!r}; a metric is one number")
    number = array.item()
    if isinstance(number, int):
        return int(number)
    return float(number) if math.isfinite(number) else None


def _rows(path: pathlib.Path) -> list[files.Line]:
    lines = list(files.read_jsonl(path, unfinished=True))
    for line in lines:
        if not isinstance(line.value, dict) or not isinstance(line.value.get("step"), int):
            raise UserError(f"{path} line {line.number} is no object with a `step`; remove that line.")
    return lines


def _warn_of_gaps(path: pathlib.Path, last: int) -> None:
    """Prints which rows up to step `last` a file lacks: the run goes on without them."""
    have = {line.value["step"] for line in _rows(path)} if path.exists() else set()
    lost = [step for step in range(1, last + 1) if step not in have]
    if lost:
        print(
            f"warning: {path} has no rows of {len(lost)} steps that are done, from {lost[0]} to {lost[-1]}; "
            "the run goes on without them.",
            flush=True,
        )


def _cut(path: pathlib.Path, last: int) -> None:
    """Cuts off the rows after step `last`, and an unfinished line."""
    if path.exists():
        kept = [line.end for line in _rows(path) if line.value["step"] <= last]
        with storage(path, "written"):
            os.truncate(path, max(kept, default=0))
