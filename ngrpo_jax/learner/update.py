"""The sharded update: TrainState and packed rows in, TrainState and metrics out.

Four compiled programs, made once for a run (`compile_programs`): `score` gives log-probabilities of rows
under any parameters, `accumulate` adds microbatches' gradients to a donated sum, `apply` makes an optimiser
step of it, `zeros` starts a sum. Their shapes never change, so nothing compiles after the first step. The
learner does not know where rows came from, nor what is done with the metrics.

`score` and `accumulate` go through up to STACK microbatches in one call: between two microbatches of a call a
device neither waits for the host nor gives its working memory back, to be handed fresh pages for it (on a
CPU a tenth of a small model's update).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngrpo_jax.algo.objectives import WEIGHTED
from ngrpo_jax.learner.loss import ForwardOptions, add_metrics, no_metrics, row_logprobs, row_loss
from ngrpo_jax.learner.packing import Rows
from ngrpo_jax.settings import ObjectiveSettings

Params = Any
Array = Any  # np.ndarray on the host, jax.Array on the devices
Sharding = jax.sharding.NamedSharding
STACK = 8  # microbatches of a call; where there are fewer, empty ones fill up the arrays and are not computed


class TrainState(NamedTuple):
    """All that an update changes: float32 master parameters (stacked), optimiser state, optimiser steps."""

    params: Params
    opt_state: Any
    step: jax.Array


class Stack(NamedTuple):
    """Microbatches of one call on the devices: room for M, of R rows of T positions each.

    Attributes:
      rows: leaves [M, R, T, ...].
      count: int32, how many there are; no program looks at what stands behind them.
    """

    rows: Rows
    count: Array


class Scored(NamedTuple):
    """Microbatches of one call with their log-probabilities before the update and by the reference."""

    stack: Stack
    old_MRT: jax.Array | None
    ref_MRT: jax.Array | None


class Sums(NamedTuple):
    """What the microbatches of an optimiser step add up to; the gradient is sharded as the parameters are."""

    gradient: Params
    metrics: Any  # a dict of scalars


@dataclasses.dataclass(frozen=True)
class HostOffload:
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

    score: jax.stages.Wrapped  # (Params, Stack) -> [M, R, T]
    zeros: jax.stages.Wrapped  # (Params, Scored) -> Sums
    accumulate: jax.stages.Wrapped  # (Sums, Params, Scored) -> Sums
    apply: jax.stages.Wrapped  # (TrainState, Sums) -> (TrainState, metrics)
    place: Callable[[Sequence[Rows]], Stack]
    optimizer: HostOffload
    reference: HostOffload


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; call under `jax.jit` with out_shardings to make it sharded."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def compile_programs(
    compute: ForwardOptions,
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
    mesh = rows_sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    of_stack = stack_sharding(rows_sharding)
    loss = functools.partial(row_loss, objective=objective, compute=compute)

    def score(params, stack):
        def one(i, scores_MRT):
            scores_RT = row_logprobs(_of_turn(params, i), _at(stack.rows, i), compute)
            return scores_MRT.at[i].set(scores_RT)

        return jax.lax.fori_loop(0, stack.count, one, jnp.zeros_like(stack.rows.sampler_logprobs_RT))

    def zeros(params, scored):
        (rows, _), *given = scored
        _, metrics = jax.eval_shape(loss, params, *_at((rows, *given), 0))
        return Sums(jax.tree.map(jnp.zeros_like, params), no_metrics(metrics))

    def accumulate(sums, params, scored):
        (rows, count), *given = scored

        def one(i, sums):
            arguments = _at((rows, *given), i)
            gradient_of = jax.value_and_grad(loss, has_aux=True)
            (_, metrics), gradient = gradient_of(_of_turn(params, i), *arguments)
            total = jax.tree.map(jnp.add, sums.gradient, gradient)
            return Sums(total, add_metrics(sums.metrics, metrics))

        return jax.lax.fori_loop(0, count, one, sums)

    def apply(state, sums):
        updates, opt_state = optimizer.update(sums.gradient, state.opt_state, state.params)
        norms = {"grad_norm": optax.tree.norm(sums.gradient), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), {**sums.metrics, **norms}

    of_params = state_shardings.params
    away_optimizer, away_reference = offload in ("optimizer", "both"), offload in ("reference", "both")
    return Programs(
        score=jax.jit(score, out_shardings=of_stack),
        zeros=jax.jit(zeros, out_shardings=Sums(of_params, whole)),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=Sums(of_params, whole)),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(state_shardings, whole)),
        place=functools.partial(_place, rows=of_stack, count=whole),
        optimizer=HostOffload(state_shardings.opt_state, away_optimizer),
        reference=HostOffload(of_params, away_reference),
    )


def stack_sharding(rows_sharding: Sharding) -> Sharding:
    """Sharding of the arrays of a Stack, which lie as rows do."""
    return jax.sharding.NamedSharding(
        rows_sharding.mesh, jax.sharding.PartitionSpec(None, *rows_sharding.spec)
    )


def _at(stacked: Any, i: int | jax.Array) -> Any:
    """The i-th of stacked trees."""
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def _of_turn(params: Params, i: jax.Array) -> Params:
    """Parameters that seem to change from turn to turn of a loop: XLA would else gather, cast and cut them
    before it, and hold all of that through it."""
    return jax.lax.optimization_barrier((params, i))[0]


def _place(microbatches: Sequence[Rows], *, rows: Sharding, count: Sharding) -> Stack:
    """This host's microbatches, as many as every host has and at most STACK, as its part of all hosts'."""
    filling = STACK - len(microbatches)

    def stacked(*leaves: np.ndarray) -> np.ndarray:
        return np.stack([*leaves, *[np.zeros_like(leaves[0])] * filling])

    own = Stack(jax.tree.map(stacked, *microbatches), np.int32(len(microbatches)))
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_process_local_data(sharding, leaf),
        own,
        Stack(jax.tree.map(lambda _: rows, own.rows), count),
    )


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
      batches: the microbatches of each optimiser step; all hosts have as many.
      old: where the old ones come from: "learner", a pass of `params`; "sampler", the rollout's record; or
        "update", where the one optimiser step that follows finds them in its own pass.
    """
    reference = None if reference is None else programs.reference.fetch(reference)

    def one(microbatches: Sequence[Rows]) -> Scored:
        stack = programs.place(microbatches)
        of_reference = None if reference is None else programs.score(reference, stack)
        of_sampler = stack.rows.sampler_logprobs_RT if old == "sampler" else None
        of_params = programs.score(params, stack) if old == "learner" else of_sampler
        return Scored(stack, of_params, of_reference)

    return [[one(batch[i : i + STACK]) for i in range(0, len(batch), STACK)] for batch in batches]


def gradients(programs: Programs, params: Params, batch: Sequence[Scored]) -> Sums:
    """Sums over the microbatches of one optimiser step: their gradients, and their metrics."""
    sums = programs.zeros(params, batch[0])
    for scored in batch:
        sums = programs.accumulate(sums, params, scored)
    return sums


def update(
    programs: Programs, state: TrainState, batches: Sequence[Sequence[Scored]]
) -> tuple[TrainState, list[dict[str, jax.Array]]]:
    """One optimiser step for each mini-batch; the state is donated. Metrics: one dict a step, on device."""
    metrics = []
    for batch in batches:
        sums = gradients(programs, state.params, batch)
        state = state._replace(opt_state=programs.optimizer.fetch(state.opt_state))
        state, figures_of_step = programs.apply(state, sums)
        state = state._replace(opt_state=programs.optimizer.store(state.opt_state))
        metrics.append(figures_of_step)
    return state, metrics


def figures(steps: Sequence[dict[str, Any]], *, gap_of_first: bool = False) -> dict[str, float]:
    """Host metrics of the optimiser steps of a batch -> `learner/...`: extremes, and means of the rest.

    What `policy_loss` sums over weights is divided by the step's weight, so that clip fractions, entropy and
    KL are means over tokens as the loss weighs them. The gap to the sampler, over all response tokens alike,
    goes to `gap/...`: mean and max of |Δ log π|, and the k3 estimate of KL(sampler ‖ trainer), nats a token;
    `gap_of_first` takes it of the first step alone, where later ones would count what the update has moved.
    A step of which no token counts (all of its groups left out, say) is in no mean over tokens nor in that of
    the loss; where there is no other step, NaN.
    """
    gap = {"gap": "gap/mean", "gap_max": "gap/max", "gap_kl": "gap/kl"}

    def share(step: dict[str, Any], name: str) -> float:
        """What the tokens that `name` is about add up to."""
        if name in WEIGHTED or name == "loss":
            return float(step["weight"])
        return float(step["scored"]) if name in gap else 1.0

    def join(name: str) -> float:
        counted = steps[:1] if gap_of_first and name in gap else steps
        if name.endswith(("_max", "_min")):
            return float((max if name.endswith("_max") else min)(step[name] for step in counted))
        counted = [step for step in counted if share(step, name) > 0]
        # The loss is a sum over tokens as it stands.
        values = [float(step[name]) / (1.0 if name == "loss" else share(step, name)) for step in counted]
        return float(np.mean(values)) if values else math.nan

    names = [name for name in steps[0] if name not in ("weight", "scored")]
    return {gap.get(name, f"learner/{name}"): join(name) for name in names}
