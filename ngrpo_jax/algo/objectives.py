"""Rewards to advantages, and log-probabilities to the loss: GRPO, GSPO, the dual clip, the KL term.

Owns the formulas (12), (13), those of GSPO, and the choices around them: penalties for long responses,
truncated importance weights, the entropy bonus. A new objective is a surrogate function and its entry in
ALGORITHMS. Must not know how the weights were filled (each token's share of the loss, which carries the
aggregation), packing beyond segment ids, microbatches, or the optimiser. Equation numbers are those of arXiv
2606.10768.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.metrics import Max, Mean, Metrics, Min, Sum

# exp stays finite up to 88. Beyond this limit the gradient is 0: the clip or the dual clip makes it so too,
# but autodiff would give 0 · inf = NaN. (For A < 0 without a dual clip this limit is the only one.)
_LARGEST_LOG_RATIO = 60.0


def group_advantages(rewards_PG: jax.Array | np.ndarray, *, scale_by_std: bool = True) -> jax.Array:
    """(12): advantages of each group's rewards, float32 [P, G].

    (r - mean) / (std + 1e-6) with n-1 in the standard deviation, or r - mean alone without `scale_by_std`
    (arXiv 2503.20783). Exactly 0 throughout a group whose rewards are all equal.
    Raises ValueError for a group of fewer than 2.
    """
    chex.assert_rank(rewards_PG, 2)
    if rewards_PG.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 samples to compare, not {rewards_PG.shape[1]}")
    r_PG = jnp.asarray(rewards_PG, jnp.float32)
    centred_PG = r_PG - jnp.mean(r_PG, axis=1, keepdims=True)
    if scale_by_std:
        centred_PG = centred_PG / (jnp.std(r_PG, axis=1, ddof=1, keepdims=True) + 1e-6)
    varied_P1 = jnp.max(r_PG, axis=1, keepdims=True) > jnp.min(r_PG, axis=1, keepdims=True)
    return jnp.where(varied_P1, centred_PG, 0.0)


def varied_groups(rewards_PG: np.ndarray) -> np.ndarray:
    """bool [P]: the groups whose rewards differ. The others have advantage 0 and only a KL term."""
    chex.assert_rank(rewards_PG, 2)
    return np.max(rewards_PG, axis=1) > np.min(rewards_PG, axis=1)


def overlong_penalty(
    lengths_B: np.ndarray, stopped_B: np.ndarray, *, limit: int, interval: int, size: float
) -> np.ndarray:
    """The penalty for length that is subtracted from each response's reward, float32 [B], 0..size.

    `size` for a response that was cut off at `limit` tokens; for one that ended by itself 0 up to `limit` -
    `interval` tokens, and from there on a share of `size` that grows linearly to 1 at the limit: the soft
    overlong punishment of DAPO (arXiv 2503.14476), whose size is 1. With `interval` 0 only responses that
    were cut off are penalised.
    """
    chex.assert_equal_shape([lengths_B, stopped_B])
    share_B = np.clip((lengths_B - (limit - interval)) / max(interval, 1), 0.0, 1.0) * (interval > 0)
    return np.float32(size) * np.where(stopped_B, share_B, 1.0).astype(np.float32)


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The k1 estimator of KL(π_θ ‖ π_ref), elementwise: log π_θ - log π_ref.

    Unbiased as a metric. In a loss its gradient is that of log π_θ, whose mean over π_θ is 0: it adds noise
    without a mean direction; k2 and k3 do draw the policy towards the reference.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return logprobs - ref_logprobs


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The k2 estimator, elementwise: (log π_θ - log π_ref)² / 2. Biased as a metric; its gradient is not."""
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The k3 estimator of KL(π_θ ‖ π_ref), elementwise: exp(q) - q - 1 with q = log π_ref - log π_θ.

    q is cut off at 60, since exp overflows float32 at 88: beyond, the value is constant and its gradient 0.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    q = ref_logprobs - logprobs
    q = jnp.minimum(q, _LARGEST_LOG_RATIO)
    return jnp.expm1(q) - q


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The static choices of `policy_loss`, which documents them.

    Raises:
      ValueError: on construction, for a choice that is unknown or out of its range.
    """

    algorithm: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    importance_cap: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        choices: dict[str, Collection[str]] = {"algorithm": ALGORITHMS, "kl_estimator": KL_ESTIMATORS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: use one of {', '.join(known)}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip} must be above 1, or None for no dual clip")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"importance_cap {self.importance_cap} must be above 0, or None for no weights")


def clipped_surrogate(ratio: jax.Array, advantage: jax.Array, config: LossConfig) -> jax.Array:
    """min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and at least dual_clip A where A < 0."""
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    if config.dual_clip is None:
        return objective
    return jnp.where(advantage < 0, jnp.maximum(objective, config.dual_clip * advantage), objective)


class Algorithm(NamedTuple):
    """An objective: its surrogate, and whether ratios are of single tokens or of whole sequences.

    Attributes:
      surrogate: (ratio, advantage, config) -> the objective of each token, to be maximised, elementwise.
      by_sequence: whether the ratio of a token is that of its sequence, exp of the mean log ratio over the
        sequence's tokens of weight > 0.
    """

    surrogate: Callable[[jax.Array, jax.Array, LossConfig], jax.Array]
    by_sequence: bool = False


ALGORITHMS = {
    "grpo": Algorithm(clipped_surrogate),  # (13)
    "gspo": Algorithm(clipped_surrogate, by_sequence=True),  # arXiv 2507.18071
}


class LossInputs(NamedTuple):
    """What the loss needs besides the log-probabilities that it differentiates; arrays [B, T].

    Attributes:
      old_logprobs: log π_old, before the batch's first update; None where π_θ itself is π_old.
      advantages: [B, T] for packed rows, constant within a segment, or [B].
      weight: each token's share of the loss; 0 where the token is not one of a response.
      ref_logprobs: log π_ref, for the KL term.
      sampler_logprobs: log π_sampler, as the rollout recorded it.
      segment_ids: int, which tokens of a row are one sequence; None for one sequence a row.
    """

    old_logprobs: jax.Array | None
    advantages: jax.Array
    weight: jax.Array
    ref_logprobs: jax.Array | None = None
    sampler_logprobs: jax.Array | None = None
    segment_ids: jax.Array | None = None


def policy_loss(
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    advantages: jax.Array,
    weight_BT: jax.Array,
    *,
    algorithm: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs_BT: jax.Array | None = None,
    kl_coef: float = 0.0,
    segment_ids_BT: jax.Array | None = None,
    kl_estimator: str = "k3",
    sampler_logprobs_BT: jax.Array | None = None,
    importance_cap: float | None = None,
    entropy_BT: jax.Array | None = None,
    entropy_coef: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(13), to be minimised: Σ weight · -(min(ratio A, clip(ratio, 1-clip_low, 1+clip_high) A) - kl_coef KL).

    Args:
      advantages: [B], or [B, T] for packed rows.
      weight_BT: each token's share of the loss, 0 where the token is not one of a response; what the other
        arrays hold there, NaN included, changes neither loss nor gradient.
      algorithm: "grpo" takes the ratio π_θ/π_old of each token; "gspo" (arXiv 2507.18071) that of its
        sequence, exp of the mean log ratio over its tokens of weight > 0. The sequence is the row or, with
        `segment_ids_BT`, the row's tokens of equal id.
      dual_clip: c > 1: for A < 0 the min-term is at least c A.
      kl_estimator: "k1", "k2" or "k3", of the KL to `ref_logprobs_BT`.
      importance_cap: multiplies the clipped objective (not the KL) by min(π_old/π_sampler, importance_cap):
        truncated importance sampling, for tokens drawn by a sampler whose numbers differ from the learner's.
        π_old is the learner's before the update, π_sampler as recorded; "gspo" takes their ratio by
        sequence too.
      entropy_coef: subtracts entropy_coef · Σ weight · `entropy_BT` from the loss.

    Returns:
      the float32 loss, with gradient for `logprobs_BT` and `entropy_BT` alone, and metrics: float32 scalars
      over tokens of weight > 0. `weight` is Σ weight. Sums of weight · x, which are means when divided by it:
      `policy_loss` (without KL and entropy), `ratio`, `clip_low` and `clip_high` (the tokens whose ratio was
      clipped from below with A < 0, from above with A > 0), `dual_clip`; where their inputs are given `kl`,
      `kl_bounded` (the tokens whose k3 is bounded), `entropy`, `importance` (the truncated weights) and
      `importance_capped`. Extremes: `ratio_min` and `ratio_max`, inf and -inf without a token of weight > 0.

    Raises:
      ValueError: for an unknown algorithm or estimator, a dual_clip of at most 1, an importance_cap that is
        not above 0, and a coefficient or cap without the arrays that it needs.
    """
    config = LossConfig(
        algorithm, clip_low, clip_high, dual_clip, kl_coef, kl_estimator, importance_cap, entropy_coef
    )
    chex.assert_rank(logprobs_BT, 2)
    chex.assert_equal_shape([logprobs_BT, old_logprobs_BT, weight_BT])
    chex.assert_shape(advantages, logprobs_BT.shape[: jnp.ndim(advantages)])
    inputs = LossInputs(
        old_logprobs_BT, advantages, weight_BT, ref_logprobs_BT, sampler_logprobs_BT, segment_ids_BT
    )
    loss, metrics = loss_and_metrics(logprobs_BT, entropy_BT, inputs, config)
    weight = metrics.pop("loss").weight
    return loss, {"weight": weight, **{name: metric[0] for name, metric in metrics.items()}}


def loss_and_metrics(
    logprobs_BT: jax.Array, entropy_BT: jax.Array | None, inputs: LossInputs, config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """`policy_loss`, with metrics that carry their own denominator; `loss` is one of them."""
    _check_needs(entropy_BT, inputs, config)
    # Masked before any arithmetic: a NaN multiplied by a weight of 0 afterwards would be NaN still.
    mask_BT = inputs.weight > 0

    def masked(x: jax.Array) -> jax.Array:
        return jnp.where(mask_BT, jnp.broadcast_to(x, mask_BT.shape).astype(jnp.float32), 0.0)

    def constant(x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(masked(x))

    def ratio(numerator_BT: jax.Array, denominator_BT: jax.Array) -> jax.Array:
        log_ratio_BT = numerator_BT - denominator_BT
        if algorithm.by_sequence:
            log_ratio_BT = _sequence_mean(log_ratio_BT, mask_BT, inputs.segment_ids)
        return jnp.exp(jnp.clip(log_ratio_BT, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))

    algorithm = ALGORITHMS[config.algorithm]
    weight_BT = masked(inputs.weight)
    total = jnp.sum(weight_BT)

    def mean(x_BT: jax.Array) -> Mean:
        return Mean(jnp.sum(weight_BT * x_BT), total)

    def share(chosen_BT: jax.Array) -> Mean:
        return Mean(jnp.sum(jnp.where(chosen_BT, weight_BT, 0.0)), total)

    advantages_BT = constant(
        inputs.advantages if jnp.ndim(inputs.advantages) == 2 else inputs.advantages[:, None]
    )
    logprobs_BT = masked(logprobs_BT)
    old_BT = constant(logprobs_BT if inputs.old_logprobs is None else inputs.old_logprobs)
    ratio_BT = ratio(logprobs_BT, old_BT)
    objective_BT = algorithm.surrogate(ratio_BT, advantages_BT, config)
    metrics: Metrics = {
        "ratio": mean(ratio_BT),
        "ratio_min": Min(jnp.min(jnp.where(mask_BT, ratio_BT, jnp.inf))),
        "ratio_max": Max(jnp.max(jnp.where(mask_BT, ratio_BT, -jnp.inf))),
        **{name: share(x_BT) for name, x_BT in _clipped(ratio_BT, advantages_BT, config).items()},
    }
    if config.importance_cap is not None and inputs.sampler_logprobs is not None:
        exact_BT = ratio(old_BT, constant(inputs.sampler_logprobs))
        importance_BT = jnp.minimum(exact_BT, config.importance_cap)
        objective_BT = importance_BT * objective_BT
        metrics["importance"] = mean(importance_BT)
        metrics["importance_capped"] = share(exact_BT > config.importance_cap)
    loss = -jnp.sum(weight_BT * objective_BT)
    metrics["policy_loss"] = Mean(loss, total)
    if inputs.ref_logprobs is not None:
        kl_BT = KL_ESTIMATORS[config.kl_estimator](logprobs_BT, constant(inputs.ref_logprobs))
        kl = metrics["kl"] = mean(kl_BT)
        q_BT = constant(inputs.ref_logprobs) - jax.lax.stop_gradient(logprobs_BT)
        metrics["kl_bounded"] = share(q_BT > _LARGEST_LOG_RATIO)
        loss = loss + config.kl_coef * kl.total if config.kl_coef else loss
    if entropy_BT is not None:
        entropy = metrics["entropy"] = mean(masked(entropy_BT))
        loss = loss - config.entropy_coef * entropy.total if config.entropy_coef else loss
    metrics["loss"] = Sum(loss, total)
    return loss, metrics


def _check_needs(entropy_BT: jax.Array | None, inputs: LossInputs, config: LossConfig) -> None:
    needs = {
        "kl_coef": ("ref_logprobs_BT", inputs.ref_logprobs),
        "entropy_coef": ("entropy_BT", entropy_BT),
        "importance_cap": ("sampler_logprobs_BT", inputs.sampler_logprobs),
    }
    for name, (array, given) in needs.items():
        if getattr(config, name) and given is None:
            raise ValueError(f"{name} is {getattr(config, name)}, which needs {array}; give both or neither")


def _clipped(ratio_BT: jax.Array, advantages_BT: jax.Array, config: LossConfig) -> dict[str, jax.Array]:
    """Which tokens lost their gradient to a clip, by the clip's name; bool [B, T] each."""
    highest = jnp.inf if config.dual_clip is None else config.dual_clip
    return {
        "clip_low": (advantages_BT < 0) & (ratio_BT < 1.0 - config.clip_low),
        "clip_high": (advantages_BT > 0) & (ratio_BT > 1.0 + config.clip_high),
        "dual_clip": (advantages_BT < 0) & (ratio_BT > highest),
    }


def _sequence_mean(x_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Each token's x replaced by the mean of x over the masked tokens of its sequence; x is 0 elsewhere."""
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros(mask_BT.shape, jnp.int32)
    chex.assert_equal_shape([x_BT, segment_ids_BT])
    length = mask_BT.shape[1]

    def of_row(x_T: jax.Array, mask_T: jax.Array, ids_T: jax.Array) -> jax.Array:
        index_T = jnp.searchsorted(jnp.sort(ids_T), ids_T)  # ids may be any integers; indices are below T
        sums = jax.ops.segment_sum(x_T, index_T, length)
        counts = jax.ops.segment_sum(mask_T.astype(jnp.float32), index_T, length)
        return (sums / jnp.maximum(counts, 1.0))[index_T]

    return jnp.where(mask_BT, jax.vmap(of_row)(x_BT, mask_BT, segment_ids_BT), 0.0)
