"""A run: what no step changes, where it stands, and how the latter is stored and found again."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo import refresh
from ngrpo_jax.commands import composition, fit
from ngrpo_jax.learner import update
from ngrpo_jax.learner.loss import Computation
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.model import attention
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.runtime import distributed, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings
from ngrpo_jax.tasks.datasets import ProblemStream

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
    "train.profile_from",
    "train.profile_steps",
    # Where the model is found. Whether it is the same one, its fingerprint in each checkpoint says.
    "model.path",
    "model.revision",
}


def best_key(settings: Settings) -> str:
    """The metric of a step's row that makes its checkpoint the best."""
    return f"eval/{settings.checkpoint.best_metric}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What no step changes."""

    settings: Settings
    workdir: pathlib.Path
    source: composition.Source
    training: composition.ProblemSet
    held_out: composition.ProblemSet
    mesh: jax.sharding.Mesh
    programs: update.Programs
    reference: Any  # parameters of the KL term; None where kl_coef is 0
    prompt_of: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: with `Run`, all that its future depends on."""

    step: int
    state: update.TrainState
    table: refresh.Maintained | None  # its bounds hold for the parameters of `state`
    table_age: int  # rollouts that the table has served
    stream: ProblemStream
    before: dict[str, float]  # held-out figures of the starting model


def prepare(
    settings: Settings,
    workdir: pathlib.Path,
    parts: tuple[composition.Source, composition.ProblemSet, composition.ProblemSet],
    devices: jax.sharding.Mesh,
    params: Any,
    checkpoints: Checkpoints,
) -> tuple[Run, Position]:
    """The run, and its position: that of the latest checkpoint, or the start. Compiles no program of a step.

    Args:
      params: the starting model's, on the mesh; donated.
    """
    source, training, held_out = parts
    programs, optimizer, abstract, shardings = make_learner(settings, source.config, devices)
    reference = None
    if settings.objective.kl_coef > 0:
        # A copy, even where the dtype is the same: the learner donates its own parameters at every step.
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, source.config.dtype, copy=True), params)
        reference = programs.reference.store(copy)
    here = distributed.place()
    stream = ProblemStream(
        training.problems,
        batch=settings.rollout.prompts // here.count,
        seed=settings.seed,
        host=here.index,
        hosts=here.count,
    )
    prompt_of = {p.id: ids for p, ids in zip(training.problems, training.prompts, strict=True)}
    run = Run(settings, workdir, source, training, held_out, devices, programs, reference, prompt_of)
    step = checkpoints.latest_step()
    if step is None:
        state = _initial_state(params, optimizer, shardings)
        position = Position(0, state, None, 0, stream, {})
    else:
        position = restore(run, checkpoints, step, abstract, shardings, stream)
    state = position.state._replace(opt_state=programs.optimizer.store(position.state.opt_state))
    return run, dataclasses.replace(position, state=state)


class Learner(NamedTuple):
    """The programs of the update, and what its state looks like; nothing is compiled and no array made."""

    programs: update.Programs
    optimizer: Any
    abstract: update.TrainState  # of jax.ShapeDtypeStruct
    shardings: update.TrainState


def make_learner(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> Learner:
    """The update of a run with these settings on this mesh."""
    optimizer = make_optimizer(settings.optimizer)
    shapes = composition.parameter_shapes(config)
    abstract = jax.eval_shape(lambda params: update.init_state(params, optimizer), shapes)
    shardings = mesh.state_shardings(devices, abstract)
    programs = update.compile_programs(
        computation(settings, config, devices),
        settings.objective,
        optimizer,
        state_shardings=shardings,
        rows_sharding=mesh.rows_sharding(devices),
        offload=settings.train.offload,
    )
    return Learner(programs, optimizer, abstract, shardings)


def computation(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> Computation:
    """How the learner computes log-probabilities in this run."""
    train = settings.train
    name = fit.attention_name(settings)
    return Computation(
        config,
        settings.rollout.temperature,
        remat=train.remat,
        logprob_chunk=train.logprob_chunk * settings.mesh.data * settings.mesh.fsdp,
        attend=attention.make(name, devices),
        unroll=train.unroll,
        table=mesh.lookup_sharding(devices),
    )


def old_logprobs(settings: Settings) -> str:
    """Where the update's old log-probabilities come from, as `update.score` takes it.

    The first optimiser step of a batch computes them itself: they are its own.
    """
    if settings.objective.old_logprobs == "sampler":
        return "sampler"
    return "update" if settings.mini_batches == 1 else "learner"


def _initial_state(params: Any, optimizer: Any, shardings: update.TrainState) -> update.TrainState:
    start = jax.jit(
        lambda params: update.init_state(params, optimizer), out_shardings=shardings, donate_argnums=0
    )
    return start(params)


def restore(
    run: Run,
    checkpoints: Checkpoints,
    step: int,
    abstract: update.TrainState,
    shardings: update.TrainState,
    stream: ProblemStream,
) -> Position:
    """The position that a checkpoint holds; ValueError where it is of a run with other settings."""
    host = checkpoints.read_host(step)
    check_resumable(host, step, run.settings, run.workdir)
    wanted = {"train": placed_shapes(abstract, shardings)}
    if host["table_age"] is not None:
        upkeep = composition.table_upkeep(run.source, run.mesh)
        shapes = upkeep.shapes(run.source.config.vocab_size)
        wanted["table"] = placed_shapes(shapes, jax.tree.map(lambda _: mesh.replicated(run.mesh), shapes))
    restored, host = checkpoints.restore(step, wanted)
    stream.set_state(host["stream"])
    if distributed.place().primary:
        print(f"resumed from step {step} of {run.workdir}.")
    return Position(
        step, restored["train"], restored.get("table"), host["table_age"] or 0, stream, host["before"]
    )


def check_resumable(host: dict[str, Any], step: int, settings: Settings, workdir: pathlib.Path) -> None:
    """ValueError where a checkpoint is of a run with other settings, or beyond the last step of this one.

    Earlier checkpoints do not store model.dtype; it is not compared then.
    """
    there, here = host["settings"], lasting_settings(settings)
    there = {"model.dtype": here["model.dtype"], **there}
    changed = [name for name in here if there.get(name) != here[name]]
    if changed:
        facts = "; ".join(f"{name} {there.get(name)}, not {here[name]}" for name in changed)
        raise ValueError(f"the run in {workdir} was made with {facts}; use those or another --workdir.")
    if step > settings.train.steps:
        raise ValueError(
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


def placed_shapes(shapes: Any, shardings: Any) -> Any:
    """Shapes with the shardings that their arrays will have."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def save(
    position: Position, settings: Settings, checkpoints: Checkpoints, row: dict[str, float] | None
) -> None:
    """Everything that the rest of the run depends on."""
    arrays: dict[str, Any] = {"train": position.state}
    if position.table is not None:
        arrays["table"] = position.table
    host = {
        "settings": lasting_settings(settings),
        "stream": position.stream.get_state(),
        "table_age": None if position.table is None else position.table_age,
        "before": position.before,
    }
    scores = None if row is None else {name: row[name] for name in row if name.startswith("eval/")}
    checkpoints.save(position.step, arrays, host, scores)


def open_checkpoint(
    source: composition.Source,
    workdir: pathlib.Path,
    devices: jax.sharding.Mesh,
    which: str,
    best: str,
) -> tuple[int, Any]:
    """(step, float32 parameters on the mesh) of a workdir's checkpoint.

    Args:
      which: "latest", "best" (or the latest where none was evaluated), "start" (the starting model), a step.
        A workdir without checkpoints gives the starting model for "best", and ValueError for the others.
      best: the metric of "best", from `best_key`.
    """
    if which == "start":
        return 0, composition.load_params(source, devices)
    with Checkpoints(workdir / "checkpoints", model=None, best=best) as checkpoints:
        steps = checkpoints.steps()
        if not steps and which == "best":
            return 0, composition.load_params(source, devices)
        named = {
            "latest": checkpoints.latest_step(),
            "best": checkpoints.best_step() or checkpoints.latest_step(),
        }
        step = named.get(which, int(which) if which.isdigit() else None)
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise ValueError(
                f"--step={which}: {workdir} has checkpoints at steps: {have}; or use best, latest, start."
            )
        shapes = composition.parameter_shapes(source.config)
        wanted = {"train": {"params": placed_shapes(shapes, mesh.param_shardings(devices, shapes))}}
        restored, _ = checkpoints.restore(step, wanted, partial=True)
    return step, restored["train"]["params"]
