"""WORKDIR/tensorboard: the metrics as event files, each metric a scalar."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ngrpo_jax.errors import storage


class TensorBoard:
    """A logger (see the package) that writes TensorBoard event files, flushed at every step."""

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._folder = workdir / "tensorboard"
        # Files are named by the second: a number keeps two attempts within one from being the same file.
        suffix = f".{sum(1 for _ in self._folder.glob('*tfevents*'))}"
        with storage(self._folder, "written"):
            # TensorBoard drops the events of an earlier attempt from the purge step on.
            self._events = SummaryWriter(str(self._folder), purge_step=first_step, filename_suffix=suffix)

    def write(
        self, step: int, metrics: Mapping[str, float | None], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Adds one point to every metric that has a finite value."""
        with storage(self._folder, "written"):
            for name, value in metrics.items():
                if value is not None:
                    self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()
