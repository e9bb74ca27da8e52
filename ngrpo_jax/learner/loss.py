"""The loss of packed rows, and their log-probabilities: what the update differentiates and what it scores.

Joins the model, the head and the objective, in chunks of tokens. Must not know shardings, compiled programs,
or how gradients become a step.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.logprobs import token_logprobs, token_loss
from ngrpo_jax.algo.objectives import policy_loss
from ngrpo_jax.learner.packing import Rows
from ngrpo_jax.model import attention, decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.settings import ObjectiveSettings

Params = Any


class ForwardOptions(NamedTuple):
    """How log-probabilities are computed: what changes time and memory, and nothing else.

    Attributes:
      config: of the decoder.
      temperature: the rollout's; sampler and learner must divide by the same.
      remat: what the backward pass recomputes, as `decoder.hidden_states` takes it.
      logprob_chunk: tokens whose logits exist at once.
      attend: how attention is computed, one of `attention.make`.
      unroll: whether layers are written out rather than scanned, as `decoder.hidden_states` takes it.
      table: sharding of the embedding while tokens are looked up in it. Left to XLA, a table split over both
        of its dimensions is gathered whole. None: as it lies.
    """

    config: ModelConfig
    temperature: float
    remat: str = "none"
    logprob_chunk: int = 1024
    attend: attention.Attend = attention.plain
    unroll: bool = False
    table: jax.sharding.Sharding | None = None


class Facts(NamedTuple):
    """What the loss of a token needs besides its log-probability; [R, T] each. `old` None: π_old is π_θ."""

    old: jax.Array | None
    reference: jax.Array | None
    behaviour: jax.Array
    advantages: jax.Array
    weight: jax.Array
    segment_ids: jax.Array


def row_loss(
    params: Params,
    rows: Rows,
    old_RT: jax.Array | None,
    ref_RT: jax.Array | None,
    *,
    objective: ObjectiveSettings,
    compute: ForwardOptions,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss (13) of some rows: their part of the optimiser step's, by the weights that they carry.

    Args:
      old_RT: log-probabilities of the targets before the step's first update; None where this is that update,
        so that they are what is computed here.
      ref_RT: the same under the reference model; None where kl_coef is 0.

    Returns:
      (loss, metrics of `_loss_of_tokens`).
    """
    hidden_RTD = _hidden(params, rows, compute)
    head_VD = decoder.head(params, compute.config)
    facts = Facts(
        old_RT, ref_RT, rows.sampler_logprobs_RT, rows.advantages_RT, rows.weight_RT, rows.segment_ids_RT
    )
    loss = functools.partial(_loss_of_tokens, objective=objective)
    if objective.algorithm == "gspo":  # its ratios join the tokens of a sequence, hence of different chunks
        logprobs_RT, entropy_RT = token_logprobs(
            hidden_RTD,
            head_VD,
            rows.targets_RT,
            compute.temperature,
            chunk=compute.logprob_chunk,
            scored_BT=rows.response_RT,
        )
        return loss(logprobs_RT, entropy_RT, rows.response_RT, facts)
    value, parts = token_loss(
        loss,
        hidden_RTD,
        head_VD,
        rows.targets_RT,
        rows.response_RT,
        facts,
        compute.temperature,
        chunk=compute.logprob_chunk,
    )
    return value, {name: join_metrics(name, values) for name, values in parts.items()}


def _loss_of_tokens(
    logprobs: jax.Array,
    entropy: jax.Array,
    scored: jax.Array,
    facts: Facts,
    *,
    objective: ObjectiveSettings,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of scored tokens [R, t]: those of `policy_loss`, and the gap to the sampler.

    Metrics are sums over weights, but for `gap` (of |log π_trainer - log π_sampler|), `gap_kl` (k3 of the
    same) and `scored`, which are plain sums over tokens, and extremes, whose names end in _min or _max.
    """
    weight = jnp.where(scored, facts.weight, 0.0)
    old = jax.lax.stop_gradient(logprobs) if facts.old is None else facts.old
    loss, metrics = policy_loss(
        logprobs,
        old,
        facts.advantages,
        weight,
        algorithm=objective.algorithm,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        ref_logprobs_BT=facts.reference,
        kl_coef=objective.kl_coef,
        segment_ids_BT=facts.segment_ids,
        kl_estimator=objective.kl_estimator,
        sampler_logprobs_BT=facts.behaviour,
        importance_cap=objective.importance_cap,
        entropy_BT=entropy,
        entropy_coef=objective.entropy_coef,
    )
    trainers = jax.lax.stop_gradient(logprobs) if objective.old_logprobs == "sampler" else old
    gap = jnp.where(scored, trainers - facts.behaviour, 0.0)
    return loss, {
        **metrics,
        "loss": loss,
        "scored": jnp.sum(scored.astype(jnp.float32)),
        "gap": jnp.sum(jnp.abs(gap)),
        "gap_max": jnp.max(jnp.abs(gap)),
        "gap_kl": jnp.sum(jnp.expm1(gap) - gap),
    }


def _hidden(params: Params, rows: Rows, compute: ForwardOptions) -> jax.Array:
    """Hidden states of the replayed mixtures, [R, T, D]."""
    if compute.table is not None:
        table_VD = jax.lax.with_sharding_constraint(params["embed"]["embedding"], compute.table)
        params = {**params, "embed": {"embedding": table_VD}}
    return decoder.hidden_states(
        params,
        compute.config,
        rows.inputs,
        positions_BT=rows.positions_RT,
        segment_ids_BT=rows.segment_ids_RT,
        prefix_ids_BT=rows.prefix_ids_RT,
        attend=compute.attend,
        remat=compute.remat,
        unroll=compute.unroll,
    )


def row_logprobs(params: Params, rows: Rows, compute: ForwardOptions) -> jax.Array:
    """Log-probability of every response token, conditioned on the replayed mixtures; float32 [R, T]."""
    return token_logprobs(
        _hidden(params, rows, compute),
        decoder.head(params, compute.config),
        rows.targets_RT,
        compute.temperature,
        chunk=compute.logprob_chunk,
        scored_BT=rows.response_RT,
        entropy=False,
    )[0]


def join_metrics(name: str, values: jax.Array) -> jax.Array:
    """Metrics of parts -> of the whole: extremes by their suffix, everything else a sum."""
    if name.endswith("_max"):
        return values.max()
    return values.min() if name.endswith("_min") else values.sum()


def no_metrics(like: dict[str, Any]) -> dict[str, jax.Array]:
    """Metrics (scalars like these) of nothing: what `add_metrics` may add to any without changing them."""
    least = {"_max": -jnp.inf, "_min": jnp.inf}
    return {name: jnp.full((), least.get(name[-4:], 0.0), value.dtype) for name, value in like.items()}


def add_metrics(some: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of two parts -> of both."""
    return {name: join_metrics(name, jnp.stack([some[name], more[name]])) for name in some}
