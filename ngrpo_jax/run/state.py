"""A training run: what no step changes, its state after a step, and how a checkpoint holds that state.

Owns what a checkpoint stores and when a run may be resumed from one. Must not know what a step computes.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax

from ngrpo_jax.algo.neighbors import refresh
from ngrpo_jax.errors import require
from ngrpo_jax.learner import update
from ngrpo_jax.model import lora
from ngrpo_jax.runtime import distributed, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import Learner
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.neighbor_table import table_config
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.setup.resume import TOKENIZER, check_resumable, lasting_settings
from ngrpo_jax.tasks.datasets import fingerprint


@dataclasses.dataclass(frozen=True)
class Run:
    """What no step changes."""

    settings: Settings
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model_spec: ModelSpec
    training: ProblemSet
    held_out: ProblemSet
    learner: Learner
    # Parameters of the KL term's model, under adapters the starting ones alone, on the same base; None before
    # `start.begin`, and where kl_coef is 0.
    reference: Any = None
    allowed: frozenset[str] = frozenset()  # what may differ from the run that is resumed

    def on_devices(self, params: Any) -> Any:
        """Parameters whose base of adapters is on the devices, wherever `train.offload` keeps it."""
        trained, base = lora.split(params)
        return lora.joined(self.learner.programs.base_offload.to_devices(base), trained)

    def reference_with(self, params: Any) -> Any:
        """The parameters of the KL term's model, under adapters with the base of `params`."""
        base = lora.split(params)[1]
        return None if self.reference is None else lora.joined(base, self.reference)


class Table(NamedTuple):
    """The neighbour table of a run, with the bounds by which it is refreshed (algo/neighbors/refresh.py)."""

    state: refresh.TableState
    age: int  # rollouts that have used it since it was last refreshed


@dataclasses.dataclass(frozen=True)
class RunState:
    """The state of a run after a step: with `Run`, all that its further steps depend on."""

    step: int
    train_state: update.TrainState
    table: Table | None  # its bounds hold for the parameters of `train_state`; None before the first rollout
    initial_evaluation: dict[str, float]  # held-out metrics of the starting model; empty until they are taken
    unfinished: tuple[dict[str, Any], list[dict[str, Any]]] | None = None  # rows of a step to be evaluated


def save(state: RunState, run: Run, checkpoints: Checkpoints, scores: dict[str, float] | None) -> None:
    """Starts to write a checkpoint of `state`.

    Args:
      scores: `eval/` metrics where the step was evaluated, None elsewhere; the best checkpoint is chosen by
        one of them.
    """
    arrays: dict[str, Any] = {"train": state.train_state.changing}
    if state.table is not None:
        arrays["table"] = state.table.state
    host = {
        "settings": lasting_settings(run.settings),
        **contents(run),
        "table_age": None if state.table is None else state.table.age,
        "initial_evaluation": state.initial_evaluation,
        "unfinished": state.unfinished,
    }
    checkpoints.save(state.step, arrays, host, scores)


def contents(run: Run) -> dict[str, str]:
    """Digests of what a run reads besides settings: problems of training, held-out ones, prompts' tokens."""
    seed = run.settings.seed
    tokens = hashlib.sha256(json.dumps(run.training.prompts).encode())
    return {
        "data": fingerprint(run.training.problems, seed),
        "held_out": fingerprint(run.held_out.problems, seed),
        "prompts": tokens.hexdigest()[:16],
    }


# What is said where a digest is another, and what --allow-changes calls it.
_CHANGED = {
    "data": ("the problems to train on", "data.train"),
    "held_out": ("the held-out problems", "data.eval"),
    "prompts": ("the tokenizer or the chat template", TOKENIZER),
}


def check_finished(settings: Settings, workdir: pathlib.Path, allowed: frozenset[str]) -> None:
    """UserError where a finished run was made with other lasting settings."""
    with Checkpoints(workdir / "checkpoints", model=None) as checkpoints:
        step = checkpoints.latest_step()
        if step is not None:
            check_resumable(checkpoints.read_host(step), step, settings, workdir, allowed)


def restore(run: Run, checkpoints: Checkpoints, step: int) -> RunState:
    """The state that a checkpoint holds, without the base where adapters are trained.

    Raises:
      ValueError: the checkpoint is of a run with other settings or other problems.
    """
    host = checkpoints.read_host(step)
    check_resumable(host, step, run.settings, run.workdir, run.allowed)
    earlier = "stream" in host
    if earlier:  # of a version that kept an iterator over the problems, a count of updates and another table
        host = {"data": host["stream"]["data"], "table_age": None, "initial_evaluation": host["before"]}
    for name, digest in contents(run).items():
        what, called = _CHANGED[name]
        require(
            # Earlier versions stored "data" alone.
            host.get(name, digest) == digest or called in run.allowed,
            f"{what} have changed since the checkpoint at step {step} in {run.workdir}; take the same ones, "
            f"use another --workdir, or add --allow-changes={called}.",
        )
    learner = run.learner
    wanted: dict[str, Any] = {"train": mesh.shapes_on(learner.abstract.changing, learner.shardings.changing)}
    if host["table_age"] is not None:
        config = table_config(run.model_spec, run.mesh)
        shapes = jax.eval_shape(lambda: refresh.empty_state(run.model_spec.config.vocab_size, config))
        wanted["table"] = mesh.shapes_on(shapes, jax.tree.map(lambda _: mesh.replicated(run.mesh), shapes))
    arrays, _ = checkpoints.restore(step, wanted, partial=earlier)
    if distributed.process().primary:
        print(f"resumed from step {step} of {run.workdir}.")
        if earlier:
            print(
                f"warning: {run.workdir} was begun by an earlier version, which took the problems in another "
                f"order: after step {step}, some of this epoch's problems come again and others do not."
            )
    table = Table(arrays["table"], host["table_age"]) if "table" in arrays else None
    return RunState(step, arrays["train"], table, host["initial_evaluation"], host.get("unfinished"))
