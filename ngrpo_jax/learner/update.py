"""The sharded update: TrainState and packed rows in, TrainState and metrics out.

Four compiled programs, made once for a run (`compile_programs`): `score` gives log-probabilities of rows
under any parameters, `accumulate` adds a microbatch's gradient to a donated sum, `apply` makes an optimiser
step of it, `zeros` starts a sum. Their shapes never change, so nothing compiles after the first step. The
learner does not know where rows came from, nor what is done with the metrics.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngrpo_jax.learner.loss import Computation, join_metrics, row_logprobs, row_loss
from ngrpo_jax.learner.packing import Rows
from ngrpo_jax.settings import ObjectiveSettings

Params = Any
Sharding = jax.sharding.NamedSharding


class TrainState(NamedTuple):
    """All that an update changes: float32 master parameters (stacked), optimiser state, optimiser steps."""

    params: Params
    opt_state: Any
    step: jax.Array


class Scored(NamedTuple):
    """A microbatch on the devices, with its log-probabilities before the update and by the reference."""

    rows: Rows
    old_RT: jax.Array | None
    ref_RT: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where arrays wait between two uses: on their devices, or (`away`) in the memory of the hosts.

    The copies either way are whole and wait for no other program, so that a device holds the arrays in the
    phases that read them alone.
    """

    shardings: Any
    away: bool

    def store(self, arrays: Any) -> Any:
        """`arrays` where they wait."""
        if not self.away:
            return arrays
        host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), self.shardings)
        return jax.device_put(arrays, host)

    def fetch(self, arrays: Any) -> Any:
        """`arrays` on their devices."""
        return jax.device_put(arrays, self.shardings) if self.away else arrays


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run; see `compile_programs`."""

    score: jax.stages.Wrapped  # (Params, Rows) -> [R, T]
    zeros: jax.stages.Wrapped  # Params -> Params
    accumulate: jax.stages.Wrapped  # (total, Params, *Scored) -> (total, metrics)
    apply: jax.stages.Wrapped  # (TrainState, gradients) -> (TrainState, metrics)
    place: Callable[[Rows], Rows]
    optimizer: Shelf
    reference: Shelf


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; call under `jax.jit` with out_shardings to make it sharded."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def compile_programs(
    compute: Computation,
    objective: ObjectiveSettings,
    optimizer: optax.GradientTransformation,
    *,
    state_shardings: TrainState,
    rows_sharding: Sharding,
    offload: str = "none",
) -> Programs:
    """Jitted programs whose results keep the given shardings.

    Args:
      compute: temperature, remat and the like.
      state_shardings: a TrainState of shardings.
      rows_sharding: of arrays whose leading dimension is rows.
      offload: what waits in the host's memory while it is not used: "none", "optimizer" (its state),
        "reference" (the model of the KL term) or "both".
    """
    whole = jax.sharding.NamedSharding(rows_sharding.mesh, jax.sharding.PartitionSpec())

    def score(params, rows):
        return row_logprobs(params, rows, compute)

    def zeros(params):
        return jax.tree.map(jnp.zeros_like, params)

    def accumulate(total, params, rows, old_RT, ref_RT):
        loss = jax.value_and_grad(row_loss, has_aux=True)
        (_, metrics), grads = loss(params, rows, old_RT, ref_RT, objective=objective, compute=compute)
        return jax.tree.map(jnp.add, total, grads), metrics

    def apply(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        figures = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), figures

    of_params = state_shardings.params
    away_optimizer, away_reference = offload in ("optimizer", "both"), offload in ("reference", "both")
    return Programs(
        score=jax.jit(score, out_shardings=rows_sharding),
        zeros=jax.jit(zeros, out_shardings=of_params),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=(of_params, whole)),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(state_shardings, whole)),
        place=functools.partial(_place, sharding=rows_sharding),
        optimizer=Shelf(state_shardings.opt_state, away_optimizer),
        reference=Shelf(of_params, away_reference),
    )


def _place(rows: Rows, *, sharding: Sharding) -> Rows:
    """This host's rows as its part of the rows of all hosts."""
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), rows)


def score(
    programs: Programs,
    params: Params,
    reference: Params | None,
    batches: Sequence[Sequence[Rows]],
    *,
    old: str = "learner",
) -> list[list[Scored]]:
    """Puts microbatches on the devices with their old and, given a reference, reference log-probabilities.

    Args:
      old: where the old ones come from: "learner", a pass of `params`; "sampler", the rollout's record; or
        "update", where the one optimiser step that follows finds them in its own pass.
    """
    reference = None if reference is None else programs.reference.fetch(reference)

    def one(rows: Rows) -> Scored:
        placed = programs.place(rows)
        of_reference = None if reference is None else programs.score(reference, placed)
        of_sampler = placed.behaviour_RT if old == "sampler" else None
        of_params = programs.score(params, placed) if old == "learner" else of_sampler
        return Scored(placed, of_params, of_reference)

    return [[one(rows) for rows in batch] for batch in batches]


def gradients(
    programs: Programs, params: Params, batch: Sequence[Scored]
) -> tuple[Params, dict[str, jax.Array]]:
    """Sum of the microbatches' gradients of one optimiser step, and their merged metrics."""
    total, parts = programs.zeros(params), []
    for microbatch in batch:
        total, part = programs.accumulate(total, params, *microbatch)
        parts.append(part)
    return total, merge(parts)


def update(
    programs: Programs, state: TrainState, batches: Sequence[Sequence[Scored]]
) -> tuple[TrainState, list[dict[str, jax.Array]]]:
    """One optimiser step for each mini-batch; the state is donated. Metrics: one dict a step, on device."""
    metrics = []
    for batch in batches:
        grads, sums = gradients(programs, state.params, batch)
        state = state._replace(opt_state=programs.optimizer.fetch(state.opt_state))
        state, norms = programs.apply(state, grads)
        state = state._replace(opt_state=programs.optimizer.store(state.opt_state))
        metrics.append({**sums, **norms})
    return state, metrics


def merge(parts: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Metrics of microbatches -> of their optimiser step: extremes by their suffix, everything else a sum."""
    return {name: join_metrics(name, jnp.stack([part[name] for part in parts])) for name in parts[0]}


def figures(steps: Sequence[dict[str, Any]], *, gap_of_first: bool = False) -> dict[str, float]:
    """Host metrics of the optimiser steps of a batch -> `learner/...`: extremes, and means of the rest.

    What `policy_loss` sums over weights is divided by the step's weight, so that clip fractions, entropy and
    KL are means over tokens as the loss weighs them. The gap to the sampler, over all response tokens alike,
    goes to `gap/...`: mean and max of |Δ log π|, and the k3 estimate of KL(sampler ‖ trainer), nats a token;
    `gap_of_first` takes it of the first step alone, where later ones would count what the update has moved.
    """
    summed = {"policy_loss", "kl", "ratio", "clip_low", "clip_high", "dual_clip", "entropy"}
    summed |= {"importance", "importance_capped"}
    gap = {"gap": "gap/mean", "gap_max": "gap/max", "gap_kl": "gap/kl"}

    def value(step: dict[str, Any], name: str) -> float:
        share = step["weight"] if name in summed else step["scored"] if name in ("gap", "gap_kl") else 1.0
        return float(step[name]) / float(share) if share else 0.0

    def join(name: str) -> float:
        counted = steps[:1] if gap_of_first and name in gap else steps
        values = [value(step, name) for step in counted]
        if name.endswith("_max"):
            return max(values)
        return min(values) if name.endswith("_min") else float(np.mean(values))

    names = [name for name in steps[0] if name not in ("weight", "scored")]
    return {gap.get(name, f"learner/{name}"): join(name) for name in names}
