"""Packed rows -> their loss and metrics, or their log-probabilities.

Joins the model, the head and the objective, in chunks of tokens. Must not know shardings of rows, compiled
programs, or how gradients become a step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo import metrics
from ngrpo_jax.algo.logprobs import token_logprobs, token_loss
from ngrpo_jax.algo.metrics import Max, Mean, Metrics
from ngrpo_jax.algo.objectives import ALGORITHMS, LossConfig, LossInputs, loss_and_metrics
from ngrpo_jax.algo.shards import ALONE, Shards
from ngrpo_jax.algo.vocabulary import Vocabulary
from ngrpo_jax.learner.packing import Rows
from ngrpo_jax.model import attention, decoder, layers
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.settings import ObjectiveSettings

Params = Any


class ForwardOptions(NamedTuple):
    """How log-probabilities are computed. Apart from `temperature`: what changes time and memory alone.

    Attributes:
      config: of the decoder.
      temperature: the rollout's; sampler and learner must divide logits by the same.
      remat: what the backward pass recomputes, as `decoder.hidden_states` takes it.
      logprob_chunk: tokens of a device whose logits exist at once.
      attend: how attention is computed, one of `attention.make`.
      unroll: whether layers are written out rather than scanned, as `decoder.hidden_states` takes it.
      rotate: how queries and keys are rotated, as `decoder.hidden_states` takes it.
      shards: of the mesh on one of whose devices this runs.
    """

    config: ModelConfig
    temperature: float
    remat: str = "none"
    logprob_chunk: int = 1024
    attend: attention.Attend = attention.plain
    unroll: bool = False
    rotate: layers.Rotate = layers.rotate
    shards: Shards = ALONE

    @property
    def vocabulary(self) -> Vocabulary:
        """How the products with the head are split over devices."""
        return Vocabulary(self.config.vocab_size, self.shards)


def row_loss(
    params: Params,
    rows: Rows,
    old_RT: jax.Array | None,
    ref_RT: jax.Array | None,
    *,
    objective: ObjectiveSettings,
    options: ForwardOptions,
) -> tuple[jax.Array, Metrics]:
    """The loss (13) of some rows: their part of the optimiser step's loss, by their token weights.

    On a device of a mesh: of its own rows. All devices along the tensor axis have the same.

    Args:
      old_RT: log-probabilities of the targets before the batch's first update; None where this is the first
        update, so that they are the log-probabilities computed here.
      ref_RT: the same under the reference model; None where kl_coef is 0.

    Returns:
      (loss, metrics of `_tokens_loss`).
    """
    hidden_RTD = _hidden(params, rows, options)
    head_VD = decoder.head(params, options.config)
    inputs = LossInputs(
        old_RT, rows.advantages_RT, rows.weight_RT, ref_RT, rows.sampler_logprobs_RT, rows.segment_ids_RT
    )
    loss = functools.partial(_tokens_loss, objective=objective)
    if ALGORITHMS[objective.algorithm].by_sequence:  # a sequence's tokens may lie in different chunks
        logprobs_RT, entropy_RT = token_logprobs(
            hidden_RTD,
            head_VD,
            rows.targets_RT,
            options.temperature,
            chunk=options.logprob_chunk,
            response_mask_BT=rows.response_mask_RT,
            vocabulary=options.vocabulary,
        )
        return loss(logprobs_RT, entropy_RT, rows.response_mask_RT, inputs)
    fused = token_loss(
        loss,
        options.temperature,
        vocabulary=options.vocabulary,
        chunk=options.logprob_chunk,
        train_head=options.config.lora is None,
    )
    value, of_chunks = fused(hidden_RTD, head_VD, rows.targets_RT, rows.response_mask_RT, inputs)
    return value, metrics.reduce(of_chunks)


def _tokens_loss(
    logprobs: jax.Array,
    entropy: jax.Array,
    response_mask: jax.Array,
    inputs: LossInputs,
    *,
    objective: ObjectiveSettings,
) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of some tokens of rows, [R, t] each.

    Metrics: `learner`, those of the objective and the loss itself; `gap`, the difference between learner and
    sampler over all response tokens alike: mean and max of |log π_learner - log π_sampler|, and the k3
    estimate of KL(sampler ‖ learner) in nats a token.
    """
    config = LossConfig(**objective.select(LossConfig))
    inputs = inputs._replace(weight=jnp.where(response_mask, inputs.weight, 0.0))
    loss, of_objective = loss_and_metrics(logprobs, entropy, inputs, config)
    # With the sampler's log-probabilities as the old ones, the learner's own are those of this very pass.
    old = None if objective.old_logprobs == "sampler" else inputs.old_logprobs
    own = jax.lax.stop_gradient(logprobs if old is None else old)
    assert inputs.sampler_logprobs is not None
    gap = jnp.where(response_mask, own - inputs.sampler_logprobs, 0.0)
    tokens = jnp.sum(response_mask.astype(jnp.float32))
    return loss, {
        "learner": of_objective,
        "gap": {
            "mean": Mean(jnp.sum(jnp.abs(gap)), tokens),
            "max": Max(jnp.max(jnp.abs(gap))),
            "kl": Mean(jnp.sum(jnp.expm1(gap) - gap), tokens),
        },
    }


def _hidden(params: Params, rows: Rows, options: ForwardOptions) -> jax.Array:
    """Hidden states of the replayed mixtures, [R, T, D]."""
    return decoder.hidden_states(
        params,
        options.config,
        rows.inputs,
        positions_BT=rows.positions_RT,
        segment_ids_BT=rows.segment_ids_RT,
        prefix_ids_BT=rows.prefix_ids_RT,
        attend=options.attend,
        rotate=options.rotate,
        remat=options.remat,
        unroll=options.unroll,
        shards=options.shards,
    )


def row_logprobs(params: Params, rows: Rows, options: ForwardOptions) -> jax.Array:
    """Log-probability of every response token, conditioned on the replayed mixtures; float32 [R, T]."""
    return token_logprobs(
        _hidden(params, rows, options),
        decoder.head(params, options.config),
        rows.targets_RT,
        options.temperature,
        chunk=options.logprob_chunk,
        response_mask_BT=rows.response_mask_RT,
        entropy=False,
        vocabulary=options.vocabulary,
    )[0]
