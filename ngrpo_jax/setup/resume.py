"""Which settings may change when a run is resumed, and which metric makes a checkpoint the best.

Plain values only: neither arrays nor checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from ngrpo_jax.errors import UserError
from ngrpo_jax.settings import Settings

MAY_CHANGE = {
    "train.steps",
    "train.rows_per_device",
    "train.remat",
    "train.logprob_chunk",
    "train.attention",
    "train.unroll",
    "train.share_prompts",
    "train.offload",
    "rollout.slots",
    "rollout.chunk",
    "rollout.layout",
    "eval.every",
    "eval.sets",
    "reward.workers",
    "train.loggers",
    "train.profile_from",
    "train.profile_steps",
    # Where the model is found. Whether it is the same one, its fingerprint in each checkpoint says.
    "model.path",
    "model.revision",
}


def best_key(settings: Settings) -> str:
    """The metric of a step's row that makes its checkpoint the best."""
    return f"eval/{settings.checkpoint.best_metric}"


def check_resumable(host: dict[str, Any], step: int, settings: Settings, workdir: pathlib.Path) -> None:
    """ValueError where a checkpoint is of a run with other settings, or beyond the last step of this one.

    Earlier checkpoints do not store model.dtype; it is not compared then.
    """
    there, here = host["settings"], lasting_settings(settings)
    there = {"model.dtype": here["model.dtype"], **there}
    changed = [name for name in here if there.get(name) != here[name]]
    if changed:
        facts = "; ".join(f"{name} {there.get(name)}, not {here[name]}" for name in changed)
        raise UserError(f"the run in {workdir} was made with {facts}; use those or another --workdir.")
    if step > settings.train.steps:
        raise UserError(
            f"the run in {workdir} is at step {step} already; raise train.steps, which is "
            f"{settings.train.steps}."
        )


def lasting_settings(settings: Settings) -> dict[str, Any]:
    """Leaf by leaf, the settings that may not change between the parts of a run; as JSON gives them back.

    The rest says where and how fast a run goes, not what it computes.
    """
    values = json.loads(json.dumps(dataclasses.asdict(settings)))
    leaves = {"seed": values.pop("seed")}
    for section, entries in values.items():
        leaves |= {f"{section}.{name}": value for name, value in entries.items()}
    return {
        name: value
        for name, value in leaves.items()
        if name not in MAY_CHANGE and not name.startswith(("mesh.", "checkpoint.", "warm_start."))
    }
