"""The sharded update: TrainState and packed rows in, TrainState and metrics out.

Four programs are compiled once for a run (`compile_programs`): `logprobs` gives the log-probabilities of rows
under any parameters, `zeros` starts the sums of an optimiser step, `accumulate` adds microbatches' gradients
and metrics to them, `apply` makes an optimiser step of them. Their shapes never change, so nothing compiles
after the first step. Must not know where rows came from, nor what is done with the metrics.

`logprobs` and `accumulate` process up to MICROBATCHES_PER_CALL microbatches in one call. Between two
microbatches of a call a device neither waits for the host nor frees its working memory, which it would get
back as fresh pages (on a CPU a tenth of a small model's update).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngrpo_jax.algo import metrics
from ngrpo_jax.algo.metrics import Mean, Metrics
from ngrpo_jax.algo.shards import Axis, Shards
from ngrpo_jax.learner.loss import ForwardOptions, row_logprobs, row_loss
from ngrpo_jax.learner.packing import Rows
from ngrpo_jax.model import lora
from ngrpo_jax.settings import ObjectiveSettings

Params = Any
Array = Any  # np.ndarray on the host, jax.Array on the devices
Sharding = jax.sharding.NamedSharding
MICROBATCHES_PER_CALL = 8  # M; where a call has fewer, empty ones fill up the arrays and are not computed


class TrainState(NamedTuple):
    """Parameters (stacked) and the optimiser's state.

    What is trained of the parameters is float32: all of them, or where they have adapters (model/lora.py)
    these alone, and the base stays as it is. The optimiser's state is of what is trained.
    """

    params: Params
    opt_state: Any

    @property
    def changing(self) -> "TrainState":
        """What an update changes, and a checkpoint holds: this state without the base of adapters."""
        return self._replace(params=lora.split(self.params)[0])

    def changed_to(self, changing: "TrainState") -> "TrainState":
        """This state with another `changing` part."""
        base = lora.split(self.params)[1]
        return changing._replace(params=lora.joined(base, changing.params))


class Microbatches(NamedTuple):
    """The microbatches of one call on the devices: M, of R rows of T positions each.

    Attributes:
      rows: leaves [M, R, T, ...].
      count: int32, how many of the M are real; the programs compute no others.
      old_logprobs_MRT: of the targets before the batch's first update; None where the update takes its own.
      ref_logprobs_MRT: of the targets under the reference model; None without a KL term.
    """

    rows: Rows
    count: Array
    old_logprobs_MRT: Array | None = None
    ref_logprobs_MRT: Array | None = None


class Sums(NamedTuple):
    """Sums over the microbatches of an optimiser step; the gradient is sharded as what is trained."""

    gradient: Params
    metrics: Any  # Metrics, or their shardings


@dataclasses.dataclass(frozen=True)
class HostOffload:
    """Moves arrays to host memory while no program reads them, if `enabled`, and back to their devices.

    A device then holds the arrays in the phases that read them alone. Each move copies whole trees, and no
    other program runs on the device at the same time.
    """

    shardings: Any
    enabled: bool

    def to_host(self, arrays: Any) -> Any:
        """`arrays` in the memory of the hosts; as they are where offloading is off."""
        if not self.enabled:
            return arrays
        host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), self.shardings)
        return jax.device_put(arrays, host)

    def to_devices(self, arrays: Any) -> Any:
        """`arrays` in the memory of their devices."""
        return jax.device_put(arrays, self.shardings) if self.enabled else arrays


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run; see `compile_programs`."""

    logprobs: jax.stages.Wrapped  # (Params, Microbatches) -> [M, R, T]
    zeros: jax.stages.Wrapped  # (Params, Microbatches) -> Sums
    accumulate: jax.stages.Wrapped  # (Sums, Params, Microbatches) -> Sums
    apply: jax.stages.Wrapped  # (TrainState.changing, Sums) -> (the same, Metrics)
    shard: Callable[[Sequence[Rows]], Microbatches]
    optimizer_offload: HostOffload
    reference_offload: HostOffload
    base_offload: HostOffload  # of the base of adapters


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; call under `jax.jit` with out_shardings to make it sharded."""
    return TrainState(params, optimizer.init(lora.split(params)[0]))


def compile_programs(
    options: ForwardOptions,
    objective: ObjectiveSettings,
    optimizer: optax.GradientTransformation,
    *,
    state_shardings: TrainState,
    rows_sharding: Sharding,
    offload: str = "none",
) -> Programs:
    """Jitted programs whose results keep the given shardings.

    Args:
      state_shardings: a TrainState of shardings.
      rows_sharding: of arrays whose leading dimension is rows.
      offload: what is in host memory while it is not used: "none", "optimizer" (its state), "reference" (the
        model of the KL term; under adapters that is the base, in use wherever parameters are) or "both".
    """
    replicated = jax.sharding.NamedSharding(rows_sharding.mesh, jax.sharding.PartitionSpec())
    sharded, of_params = microbatches_sharding(rows_sharding), state_shardings.params
    of_changing, of_base = state_shardings.changing, lora.split(of_params)[1]
    of_sums = Sums(of_changing.params, replicated)
    shards = make_shards(rows_sharding.mesh, of_params)
    alone = functools.partial(row_loss, objective=objective, options=options)
    options = options._replace(shards=shards)

    def loss(trained, base, *given):
        """This device's part of the loss, of which devices along the tensor axis have a share each."""
        params = lora.joined(base, trained)
        value, measured = row_loss(params, *given, objective=objective, options=options)
        return value / shards.tensor.size, measured

    def logprobs(params, microbatches):
        def one(i, logprobs_MRT):
            logprobs_RT = row_logprobs(_of_iteration(params, i), _at(microbatches.rows, i), options)
            return logprobs_MRT.at[i].set(logprobs_RT)

        zeros_MRT = jnp.zeros_like(microbatches.rows.sampler_logprobs_RT)
        return jax.lax.fori_loop(0, microbatches.count, one, zeros_MRT)

    def zeros(params, microbatches):
        rows, _, *given = microbatches
        _, shapes = jax.eval_shape(alone, params, *_at((rows, *given), 0))
        return Sums(jax.tree.map(jnp.zeros_like, lora.split(params)[0]), metrics.empty(shapes))

    def accumulate(sums, params, microbatches):
        rows, count, *given = microbatches

        def one(i, sums):
            gradient_of = jax.value_and_grad(loss, has_aux=True)
            parts = lora.split(_of_iteration(params, i))
            (_, measured), gradient = gradient_of(*parts, *_at((rows, *given), i))
            total = jax.tree.map(jnp.add, sums.gradient, gradient)
            return Sums(total, metrics.combine(sums.metrics, measured))

        return _joined(jax.lax.fori_loop(0, count, one, _parted(sums, shards)), shards)

    def apply(state, sums):
        updates, opt_state = optimizer.update(sums.gradient, state.opt_state, state.params)
        grad_norm = optax.tree.norm(sums.gradient)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.metrics["learner"]["loss"][0])
        # Not optax.apply_if_finite, whose counters would change what a checkpoint holds.
        updated = TrainState(optax.apply_updates(state.params, updates), opt_state)
        updated = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        numbers = {
            "grad_norm": grad_norm,
            "update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        measured = {name: Mean(number, jnp.ones_like(number)) for name, number in numbers.items()}
        return updated, {**sums.metrics, "learner": {**sums.metrics["learner"], **measured}}

    on_devices = functools.partial(_on_devices, rows_sharding=sharded)
    logprobs = on_devices(logprobs, (of_params,), sharded)
    accumulate = on_devices(accumulate, (of_sums, of_params), of_sums)
    return Programs(
        logprobs=jax.jit(logprobs, out_shardings=sharded),
        zeros=jax.jit(zeros, out_shardings=of_sums),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=of_sums),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(of_changing, replicated)),
        shard=functools.partial(_shard, sharded=sharded, replicated=replicated),
        optimizer_offload=HostOffload(state_shardings.opt_state, offload in ("optimizer", "both")),
        reference_offload=HostOffload(of_params, offload in ("reference", "both") and not of_base),
        base_offload=HostOffload(of_base, offload in ("reference", "both")),
    )


def make_shards(mesh: Any, of_params: Any) -> Shards:
    """The axes of this mesh for a program under `jax.shard_map`, with the specs that split the parameters."""
    axes = {name: Axis(name, mesh.shape[name]) for name in ("data", "fsdp", "tensor")}
    return Shards(**axes, specs=jax.tree.map(lambda sharding: sharding.spec, of_params))


def _on_devices(
    program: Callable, given: tuple[Any, ...], result: Any, *, rows_sharding: Sharding
) -> Callable:
    """`program` of these arguments and of microbatches as the program of each device, on its own parts.

    Collectives are only those that the program contains: XLA chooses none.

    Args:
      given, result: shardings of the arguments before the microbatches, and of the result.
      rows_sharding: of microbatches.
    """
    mesh = rows_sharding.mesh
    if mesh.size == 1:
        return program
    specs, of_result = jax.tree.map(lambda sharding: sharding.spec, (given, result))

    @functools.wraps(program)  # a profile, or a log of compilations, has the program's own name
    def on_mesh(*arguments):
        of_rows = jax.tree.map(
            lambda leaf: rows_sharding.spec if leaf.ndim else jax.sharding.PartitionSpec(), arguments[-1]
        )
        return jax.shard_map(
            program, mesh=mesh, in_specs=(*specs, of_rows), out_specs=of_result, check_vma=False
        )(*arguments)

    return on_mesh


def _parted(sums: Sums, shards: Shards) -> Sums:
    """Sums that devices hold alike, on the first of them alone: each adds its own terms to what it has."""
    if not shards.axes:
        return sums

    def on_first(x: jax.Array, nothing: jax.Array, names: Sequence[str]) -> jax.Array:
        places = [jax.lax.axis_index(name) for name in names]
        return jnp.where(sum(places, jnp.int32(0)) == 0, x, nothing) if places else x

    gradient = jax.tree.map(
        lambda leaf, spec: on_first(leaf, jnp.zeros_like(leaf), shards.absent(spec)),
        sums.gradient,
        lora.split(shards.specs)[0],
    )
    nothing = metrics.empty(sums.metrics)
    names = shards.of_rows
    return Sums(gradient, jax.tree.map(lambda x, none: on_first(x, none, names), sums.metrics, nothing))


def _joined(sums: Sums, shards: Shards) -> Sums:
    """The sums of what the devices have: the inverse of `_parted`."""
    if not shards.axes:
        return sums

    def total(leaf: jax.Array, spec: Any) -> jax.Array:
        names = shards.absent(spec)
        return jax.lax.psum(leaf, names) if names else leaf

    gradient = jax.tree.map(total, sums.gradient, lora.split(shards.specs)[0])
    return Sums(gradient, metrics.over_devices(sums.metrics, shards.of_rows))


def microbatches_sharding(rows_sharding: Sharding) -> Sharding:
    """Sharding of arrays [M, R, ...]: that of rows, whole along M."""
    spec = jax.sharding.PartitionSpec(None, *rows_sharding.spec)
    return jax.sharding.NamedSharding(rows_sharding.mesh, spec)


def _at(stacked: Any, i: int | jax.Array) -> Any:
    """The i-th of stacked trees."""
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def _of_iteration(params: Params, i: jax.Array) -> Params:
    """`params`, made to depend on the loop index i: otherwise XLA would gather, cast and slice loop-invariant
    parameters before the loop and hold all of the result through it."""
    return jax.lax.optimization_barrier((params, i))[0]


def _shard(microbatches: Sequence[Rows], *, sharded: Sharding, replicated: Sharding) -> Microbatches:
    """Microbatches of this host, at most M and as many as on every host, as its part of all hosts' arrays."""
    missing = MICROBATCHES_PER_CALL - len(microbatches)

    def stacked(*leaves: np.ndarray) -> jax.Array:
        stack = np.stack([*leaves, *[np.zeros_like(leaves[0])] * missing])
        return jax.make_array_from_process_local_data(sharded, stack)

    count = jax.make_array_from_process_local_data(replicated, np.int32(len(microbatches)))
    return Microbatches(jax.tree.map(stacked, *microbatches), count)


def compute_logprobs(
    programs: Programs,
    params: Params,
    reference: Params | None,
    batches: Sequence[Sequence[Rows]],
    *,
    old: str = "learner",
) -> list[list[Microbatches]]:
    """Puts microbatches on the devices with their old and, given a reference, reference log-probabilities.

    Args:
      batches: the microbatches of each optimiser step; all hosts have equally many.
      old: where the old ones come from: "learner", a pass of `params`; "sampler", the rollout's record; or
        "update", where the one optimiser step that follows computes them in its own pass.
    """
    reference = None if reference is None else programs.reference_offload.to_devices(reference)

    def one(rows: Sequence[Rows]) -> Microbatches:
        microbatches = programs.shard(rows)
        of_ref = None if reference is None else programs.logprobs(reference, microbatches)
        of_sampler = microbatches.rows.sampler_logprobs_RT if old == "sampler" else None
        of_old = programs.logprobs(params, microbatches) if old == "learner" else of_sampler
        return microbatches._replace(old_logprobs_MRT=of_old, ref_logprobs_MRT=of_ref)

    size = MICROBATCHES_PER_CALL
    return [[one(batch[i : i + size]) for i in range(0, len(batch), size)] for batch in batches]


def gradients(programs: Programs, params: Params, batch: Sequence[Microbatches]) -> Sums:
    """Sums over the microbatches of one optimiser step: their gradients, and their metrics."""
    sums = programs.zeros(params, batch[0])
    for microbatches in batch:
        sums = programs.accumulate(sums, params, microbatches)
    return sums


def update(
    programs: Programs, state: TrainState, batches: Sequence[Sequence[Microbatches]]
) -> tuple[TrainState, list[Metrics]]:
    """One optimiser step for each mini-batch; the state is donated, but for the base of adapters.

    Each step's metrics are device arrays.
    """
    steps = []
    for batch in batches:
        sums = gradients(programs, state.params, batch)
        state = state._replace(opt_state=programs.optimizer_offload.to_devices(state.opt_state))
        changing, measured = programs.apply(state.changing, sums)
        state = state.changed_to(changing)
        state = state._replace(opt_state=programs.optimizer_offload.to_host(state.opt_state))
        steps.append(measured)
    return state, steps


def batch_metrics(steps: Sequence[Metrics], *, gap_of_first: bool = False) -> dict[str, float]:
    """Metrics of the optimiser steps of a batch, on the host -> `learner/...` and `gap/...`.

    Extremes are those over all steps, the rest means over the steps. `gap_of_first` takes the gap to the
    sampler from the first step alone, where later steps would measure what the update has changed.
    """
    return {
        f"{group}/{name}": metrics.value(
            [step[group][name] for step in (steps[:1] if gap_of_first and group == "gap" else steps)]
        )
        for group, named in steps[0].items()
        for name in named
    }
