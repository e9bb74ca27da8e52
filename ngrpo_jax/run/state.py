"""A run: what no step changes, its state after a step, and how that state is saved and restored."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from ngrpo_jax.algo.neighbors import refresh
from ngrpo_jax.learner import update
from ngrpo_jax.runtime import distributed, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.policy import table_config
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.setup.resume import check_resumable, lasting_settings
from ngrpo_jax.tasks.datasets import ProblemStream


@dataclasses.dataclass(frozen=True)
class Run:
    """What no step changes."""

    settings: Settings
    workdir: pathlib.Path
    model_spec: ModelSpec
    training: ProblemSet
    held_out: ProblemSet
    mesh: jax.sharding.Mesh
    programs: update.Programs
    reference: Any  # parameters of the KL term; None where kl_coef is 0
    prompt_of: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class RunState:
    """Where a run stands: with `Run`, all that its future depends on."""

    step: int
    train_state: update.TrainState
    table: refresh.TableState | None  # its bounds hold for the parameters of `state`
    table_age: int  # rollouts that the table has served
    stream: ProblemStream
    initial_evaluation: dict[str, float]  # held-out figures of the starting model


def restore(
    run: Run,
    checkpoints: Checkpoints,
    step: int,
    abstract: update.TrainState,
    shardings: update.TrainState,
    stream: ProblemStream,
) -> RunState:
    """The state that a checkpoint holds; ValueError where it is of a run with other settings."""
    host = checkpoints.read_host(step)
    check_resumable(host, step, run.settings, run.workdir)
    wanted = {"train": mesh.shapes_on(abstract, shardings)}
    table = host.get("table")
    if table is not None:
        config = table_config(run.model_spec, run.mesh)
        shapes = config.shapes(run.model_spec.config.vocab_size)
        wanted["table"] = mesh.shapes_on(shapes, jax.tree.map(lambda _: mesh.replicated(run.mesh), shapes))
    # Older checkpoints hold a table in other arrays: it is passed over, and the next refresh builds it anew.
    restored, host = checkpoints.restore(step, wanted, partial="table" not in host)
    stream.set_state(host["stream"])
    if distributed.process().primary:
        print(f"resumed from step {step} of {run.workdir}.")
    return RunState(
        step,
        restored["train"],
        restored.get("table"),
        0 if table is None else table["age"],
        stream,
        host["before"],
    )


def save(state: RunState, settings: Settings, checkpoints: Checkpoints, row: dict[str, float] | None) -> None:
    """Everything that the rest of the run depends on."""
    arrays: dict[str, Any] = {"train": state.train_state}
    if state.table is not None:
        arrays["table"] = state.table
    host = {
        "settings": lasting_settings(settings),
        "stream": state.stream.get_state(),
        "table": None if state.table is None else {"age": state.table_age},
        "before": state.initial_evaluation,
    }
    scores = None if row is None else {name: row[name] for name in row if name.startswith("eval/")}
    checkpoints.save(state.step, arrays, host, scores)
