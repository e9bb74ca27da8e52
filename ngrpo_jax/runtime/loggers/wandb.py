"""Weights & Biases: the metrics, and tables of whole groups, in the project of `log.wandb`.

Its own environment variables apply: WANDB_MODE=offline writes to WORKDIR/wandb alone, for `wandb sync` later.
"""

import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ngrpo_jax import files

TABLE_EVERY = 20  # steps between two tables of groups: each may have a hundred kilobytes
_COLUMNS = ("step", "id", "problem", "answer", "sample", "response", "reward", "tokens", "stopped", "logprob")


class WandB:
    """A logger (see the package) for Weights & Biases. A resumed run goes on in the same run there.

    The steps that a resumed run makes again are logged again; they have the same values.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        import wandb

        self._wandb = wandb
        config = files.read_json(workdir / "config.json")
        entity, _, project = (config["log"]["wandb"] or "ngrpo_jax").rpartition("/")
        identity = workdir / "wandb.json"
        if first_step == 0 or not identity.exists():
            files.write_json(identity, {"id": secrets.token_hex(4)})
        self._run = wandb.init(
            project=project,
            entity=entity or None,
            id=files.read_json(identity)["id"],
            name=workdir.resolve().name,
            resume="allow",
            config=config,
            dir=str(workdir),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(
        self, step: int, metrics: Mapping[str, float | None], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Logs the finite metrics, and at every TABLE_EVERY-th step the groups as a table."""
        row: dict[str, Any] = {name: value for name, value in metrics.items() if value is not None}
        if samples and step % TABLE_EVERY == 1 % TABLE_EVERY:
            rows = [[sample.get(name) for name in _COLUMNS] for sample in samples]
            row["groups"] = self._wandb.Table(columns=list(_COLUMNS), data=rows)
        self._run.log({"step": step, **row})

    def close(self) -> None:
        """Waits until everything is sent, or written where the mode is offline."""
        self._run.finish()
