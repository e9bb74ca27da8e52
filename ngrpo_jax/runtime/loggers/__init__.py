"""Where the metrics of a run go besides metrics.jsonl: one logger a file, chosen by `train.loggers`.

A new logger is a file of this folder with a class like `Logger`, and an entry in LOGGERS. `settings.py` reads
the names, so nothing here may import JAX, nor, at its top, a library that is slow to import.
"""

import importlib.util
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from ngrpo_jax.errors import require
from ngrpo_jax.runtime.loggers.tensorboard import TensorBoard
from ngrpo_jax.runtime.loggers.wandb import WandB


class Logger(Protocol):
    """One destination of the metrics; made on the first process alone."""

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        """Opens the destination in the run's folder.

        Args:
            workdir: of the run; it exists.
            first_step: the first step that will be written. What an earlier attempt wrote of this step and of
                later ones is out of date: the resumed run makes them again.
        """

    def write(
        self, step: int, metrics: Mapping[str, float | None], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Takes the metrics of one step and its rows of samples.jsonl; None: a value that is not finite.

        Steps never decrease; those of an evaluation before the first step and after the last come alone.
        """

    def close(self) -> None:
        """Writes what is still held back."""


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}
# What a logger imports beyond requirements.txt, and the extra of pyproject.toml that has it.
_EXTRAS = {"wandb": "wandb"}


def require_installed(names: Collection[str]) -> None:
    """UserError where a logger's library is not installed."""
    for name, module in _EXTRAS.items():
        there = name not in names or importlib.util.find_spec(module) is not None
        require(there, f"the logger {name} needs the package {module}; install it: pip install {module}.")
