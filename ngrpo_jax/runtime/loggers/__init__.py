"""Where the metrics of a run go besides metrics.jsonl: one logger a file, chosen by `train.loggers`.

A new logger is a file of this folder with a class like `Logger`, and an entry in LOGGERS. `settings.py` reads
the names, so nothing here may import JAX, nor, at its top, a library that is slow to import.
"""

import pathlib
from collections.abc import Mapping
from typing import Protocol

from ngrpo_jax.runtime.loggers.tensorboard import TensorBoard


class Logger(Protocol):
    """One destination of the metrics; made on the first process alone."""

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        """Opens the destination in the run's folder.

        Args:
            workdir: of the run; it exists.
            first_step: the first step that will be written. What an earlier attempt wrote of this step and of
                later ones is out of date: the resumed run makes them again.
        """

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of one step; None stands for a value that is not finite. Steps increase."""

    def close(self) -> None:
        """Writes what is still held back."""


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard}
