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

from ngrpo_jax.algo.logprobs import token_logprobs
from ngrpo_jax.algo.objectives import policy_loss
from ngrpo_jax.learner.packing import Gather, Rows, one_host
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
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
    old_RT: jax.Array
    ref_RT: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run; see `compile_programs`."""

    score: jax.stages.Wrapped  # (Params, Rows) -> [R, T]
    zeros: jax.stages.Wrapped  # Params -> Params
    accumulate: jax.stages.Wrapped  # (total, Params, *Scored) -> (total, metrics)
    apply: jax.stages.Wrapped  # (TrainState, gradients) -> (TrainState, metrics)
    place: Callable[[Rows], Rows]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; call under `jax.jit` with out_shardings to make it sharded."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def row_loss(
    params: Params,
    rows: Rows,
    old_RT: jax.Array,
    ref_RT: jax.Array | None,
    *,
    config: ModelConfig,
    objective: ObjectiveSettings,
    temperature: float,
    remat: str,
    logprob_chunk: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss (13) of some rows: their part of the optimiser step's, by the weights that they carry.

    Args:
      old_RT: log-probabilities of the targets before the step's first update.
      ref_RT: the same under the reference model; None where kl_coef is 0.

    Returns:
      (loss, metrics of `policy_loss` and the entropy, summed over weights).
    """
    logprobs_RT, entropy_RT = _logprobs(
        params, rows, config=config, temperature=temperature, remat=remat, logprob_chunk=logprob_chunk
    )
    loss, metrics = policy_loss(
        logprobs_RT,
        old_RT,
        rows.advantages_RT,
        rows.weight_RT,
        algorithm=objective.algorithm,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        ref_logprobs_BT=ref_RT,
        kl_coef=objective.kl_coef,
        segment_ids_BT=rows.segment_ids_RT,
    )
    return loss, {**metrics, "entropy": jnp.sum(rows.weight_RT * entropy_RT), "loss": loss}


def _logprobs(
    params: Params, rows: Rows, *, config: ModelConfig, temperature: float, remat: str, logprob_chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every target, conditioned on the replayed mixtures, float32 [R, T]."""
    hidden_RTD = decoder.hidden_states(
        params,
        config,
        rows.inputs,
        positions_BT=rows.positions_RT,
        segment_ids_BT=rows.segment_ids_RT,
        remat=remat,
    )
    head_DV = decoder.head(params, config)
    return token_logprobs(hidden_RTD, head_DV, rows.targets_RT, temperature, chunk=logprob_chunk)


def compile_programs(
    config: ModelConfig,
    objective: ObjectiveSettings,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float,
    remat: str,
    logprob_chunk: int,
    state_shardings: TrainState,
    rows_sharding: Sharding,
) -> Programs:
    """Jitted programs whose results keep the given shardings.

    Args:
      temperature: the rollout's; sampler and learner must divide by the same.
      remat: what the backward pass recomputes, as `decoder.hidden_states` takes it.
      logprob_chunk: tokens whose logits exist at once.
      state_shardings: a TrainState of shardings.
      rows_sharding: of arrays whose leading dimension is rows.
    """
    fixed: dict[str, Any] = dict(
        config=config, temperature=temperature, remat=remat, logprob_chunk=logprob_chunk
    )
    whole = jax.sharding.NamedSharding(rows_sharding.mesh, jax.sharding.PartitionSpec())

    def score(params, rows):
        return _logprobs(params, rows, **fixed)[0]  # XLA then leaves the entropy out

    def zeros(params):
        return jax.tree.map(jnp.zeros_like, params)

    def accumulate(total, params, rows, old_RT, ref_RT):
        loss = jax.value_and_grad(row_loss, has_aux=True)
        (_, metrics), grads = loss(params, rows, old_RT, ref_RT, objective=objective, **fixed)
        return jax.tree.map(jnp.add, total, grads), metrics

    def apply(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        figures = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), figures

    of_params = state_shardings.params
    return Programs(
        score=jax.jit(score, out_shardings=rows_sharding),
        zeros=jax.jit(zeros, out_shardings=of_params),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=(of_params, whole)),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(state_shardings, whole)),
        place=functools.partial(_place, sharding=rows_sharding),
    )


def _place(rows: Rows, *, sharding: Sharding) -> Rows:
    """This host's rows as its part of the rows of all hosts."""
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), rows)


def _own_rows(array_RT: jax.Array) -> np.ndarray:
    """This host's part of an array over rows, in the order in which `_place` took it."""
    starts = {shard.index[0].start or 0: shard.data for shard in array_RT.addressable_shards}
    return np.concatenate([np.asarray(starts[start]) for start in sorted(starts)])


def score(
    programs: Programs, params: Params, reference: Params | None, batches: Sequence[Sequence[Rows]]
) -> list[list[Scored]]:
    """Puts microbatches on the devices with their old and, given a reference, reference log-probabilities."""

    def one(rows: Rows) -> Scored:
        placed = programs.place(rows)
        of_reference = None if reference is None else programs.score(reference, placed)
        return Scored(placed, programs.score(params, placed), of_reference)

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
        state, norms = programs.apply(state, grads)
        metrics.append({**sums, **norms})
    return state, metrics


def merge(parts: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Metrics of microbatches -> of their optimiser step: extremes by their suffix, everything else a sum."""

    def join(name: str) -> jax.Array:
        values = jnp.stack([part[name] for part in parts])
        if name.endswith("_max"):
            return values.max()
        return values.min() if name.endswith("_min") else values.sum()

    return {name: join(name) for name in parts[0]}


def figures(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Host metrics of the optimiser steps of a batch -> `learner/...`: extremes, and means of the rest.

    What `policy_loss` sums over weights is divided by the step's weight, so that clip fractions, entropy and
    KL are means over tokens as the loss weighs them.
    """
    summed = {"policy_loss", "kl", "ratio", "clip_low", "clip_high", "dual_clip", "entropy"}

    def value(step: dict[str, Any], name: str) -> float:
        weight = float(step["weight"]) if name in summed else 1.0
        return float(step[name]) / weight if weight else 0.0

    def join(name: str) -> float:
        values = [value(step, name) for step in steps]
        if name.endswith("_max"):
            return max(values)
        return min(values) if name.endswith("_min") else float(np.mean(values))

    return {f"learner/{name}": join(name) for name in steps[0] if name != "weight"}


def sampler_gap(
    batches: Sequence[Sequence[Rows]], scored: Sequence[Sequence[Scored]], gather: Gather = one_host
) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the sampler's, over all response tokens of all hosts.

    Returns:
      gap/mean and gap/max of |Δ log π|, gap/kl: the k3 estimate of KL(sampler ‖ trainer); nats a token.
    """
    pairs = [
        (rows, _own_rows(item.old_RT).astype(np.float64))
        for batch, items in zip(batches, scored, strict=True)
        for rows, item in zip(batch, items, strict=True)
    ]
    delta = np.concatenate([(old_RT - rows.behaviour_RT)[rows.response_RT] for rows, old_RT in pairs])
    sums = [delta.size, float(np.abs(delta).sum()), float((np.exp(delta) - delta - 1.0).sum())]
    *of_hosts, largest = zip(*gather([*sums, float(np.abs(delta).max())]), strict=True)
    count, gap, kl = map(sum, of_hosts)
    return {"gap/mean": gap / count, "gap/max": max(largest), "gap/kl": kl / count}
