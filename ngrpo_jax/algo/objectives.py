"""Rewards to advantages, and log-probabilities to the loss: GRPO, GSPO, the dual clip, the KL term.

Owns: the formulas (12), (13), those of GSPO, and the choices around them: penalties for long responses,
truncated importance weights, the entropy bonus. Must not know: how the weights were filled (each token's
share of the loss, which carries the aggregation), packing beyond segment ids, microbatches, the optimiser.
Equation numbers are those of arXiv 2606.10768.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

ALGORITHMS = ("grpo", "gspo")
# Metrics of `policy_loss` that are sums of weight times something: means once divided by the sum of `weight`.
WEIGHTED = frozenset({"policy_loss", "ratio", "clip_low", "clip_high", "dual_clip", "kl", "entropy"})
WEIGHTED |= {"importance", "importance_capped"}

# exp stays finite up to 88. Beyond this the gradient is cut to 0: the clip or the dual clip does so too, but
# autodiff would make it 0 · inf = NaN. (For A < 0 without a dual clip it is this alone.)
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
    """bool [P]: the groups whose rewards differ. The others have advantage 0 and feel the KL term alone."""
    chex.assert_rank(rewards_PG, 2)
    return np.max(rewards_PG, axis=1) > np.min(rewards_PG, axis=1)


def overlong_penalty(
    lengths_B: np.ndarray, stopped_B: np.ndarray, *, limit: int, interval: int, size: float
) -> np.ndarray:
    """What a response's reward loses for its length, float32 [B], 0..size.

    `size` for a response that was cut off at `limit` tokens; for one that ended by itself 0 up to `limit` -
    `interval` tokens, and from there on a share of `size` that grows linearly to 1 at the limit: the soft
    overlong punishment of DAPO (arXiv 2503.14476), whose size is 1. With `interval` 0 only those cut off
    lose anything.
    """
    chex.assert_equal_shape([lengths_B, stopped_B])
    share_B = np.clip((lengths_B - (limit - interval)) / max(interval, 1), 0.0, 1.0) * (interval > 0)
    return np.float32(size) * np.where(stopped_B, share_B, 1.0).astype(np.float32)


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The k1 estimator of KL(π_θ ‖ π_ref), elementwise: log π_θ - log π_ref.

    Unbiased as a figure. In a loss its gradient is that of log π_θ, whose mean over π_θ is 0: it adds noise
    and no pull; k2 or k3 pull towards the reference.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return logprobs - ref_logprobs


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The k2 estimator, elementwise: (log π_θ - log π_ref)² / 2. Biased as a figure; its gradient is not."""
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The k3 estimator of KL(π_θ ‖ π_ref), elementwise: exp(q) - q - 1 with q = log π_ref - log π_θ."""
    chex.assert_equal_shape([logprobs, ref_logprobs])
    q = ref_logprobs - logprobs
    return jnp.expm1(q) - q


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


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

    `advantages` [B], or [B, T] for packed rows. `weight_BT` is each token's share of the loss, 0 where the
    token is not one of a response; what the other arrays hold there, be it NaN, touches neither loss nor
    gradient. `algorithm` "grpo" takes the ratio π_θ/π_old of each token; "gspo" (arXiv 2507.18071) that of
    its sequence, exp of the mean log ratio over its tokens of weight > 0, the sequence being the row or, with
    `segment_ids_BT`, the row's tokens of equal id. `dual_clip` c > 1: for A < 0 the min-term is at least c A.
    `importance_cap` multiplies the clipped objective (not the KL) by min(π_old/π_sampler, importance_cap):
    truncated importance sampling, for tokens that were drawn by a sampler whose numbers differ from the
    trainer's. π_old is `old_logprobs_BT`, the trainer's before the update, π_sampler `sampler_logprobs_BT`,
    as recorded; "gspo" takes their ratio by sequence too. `entropy_coef` takes entropy_coef · Σ weight ·
    `entropy_BT` off the loss. `kl_estimator`: "k1", "k2", "k3".
    Only `logprobs_BT` and `entropy_BT` get gradient. The settings are static Python values.

    Returns the float32 loss and metrics, float32 scalars over tokens of weight > 0. Sums of weight, which add
    over microbatches: `weight`, and those of WEIGHTED, means on division by it: `policy_loss` (without
    KL and entropy), `ratio`, `clip_low` and `clip_high` (weight of the tokens whose ratio was
    clipped from below with A < 0, from above with A > 0), `dual_clip`; given what they need `kl`, `entropy`,
    `importance` (the truncated weights) and `importance_capped`. Extremes, of which to take the min and
    max over microbatches: `ratio_min` and `ratio_max`; inf and -inf where no token counts.

    Raises ValueError for an unknown algorithm or estimator, a dual_clip of at most 1, an importance_cap that
    is not above 0, and for a coefficient or cap without the arrays that it needs.
    """
    _check(algorithm, dual_clip, kl_estimator)
    _check_needs(kl_coef, ref_logprobs_BT, importance_cap, sampler_logprobs_BT, entropy_coef, entropy_BT)
    chex.assert_rank(logprobs_BT, 2)
    chex.assert_equal_shape([logprobs_BT, old_logprobs_BT, weight_BT])
    chex.assert_shape(advantages, logprobs_BT.shape[: jnp.ndim(advantages)])
    # Masked before any arithmetic: a NaN multiplied by a weight of 0 afterwards would be NaN still.
    mask_BT = weight_BT > 0

    def masked(x: jax.Array) -> jax.Array:
        return jnp.where(mask_BT, jnp.broadcast_to(x, mask_BT.shape).astype(jnp.float32), 0.0)

    weight_BT = masked(weight_BT)
    advantages_BT = masked(advantages if jnp.ndim(advantages) == 2 else advantages[:, None])
    advantages_BT = jax.lax.stop_gradient(advantages_BT)
    logprobs_BT = masked(logprobs_BT)
    old_logprobs_BT = jax.lax.stop_gradient(masked(old_logprobs_BT))

    def ratio(numerator_BT: jax.Array, denominator_BT: jax.Array) -> jax.Array:
        log_ratio_BT = numerator_BT - denominator_BT
        if algorithm == "gspo":
            log_ratio_BT = _sequence_mean(log_ratio_BT, mask_BT, segment_ids_BT)
        return jnp.exp(jnp.clip(log_ratio_BT, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))

    ratio_BT = ratio(logprobs_BT, old_logprobs_BT)
    objective_BT = _clipped_objective(ratio_BT, advantages_BT, clip_low, clip_high, dual_clip)
    metrics = _ratio_metrics(ratio_BT, advantages_BT, weight_BT, mask_BT, clip_low, clip_high, dual_clip)
    if importance_cap is not None and sampler_logprobs_BT is not None:
        exact_BT = ratio(old_logprobs_BT, jax.lax.stop_gradient(masked(sampler_logprobs_BT)))
        importance_BT = jnp.minimum(exact_BT, importance_cap)
        objective_BT = importance_BT * objective_BT
        metrics["importance"] = jnp.sum(weight_BT * importance_BT)
        metrics["importance_capped"] = jnp.sum(jnp.where(exact_BT > importance_cap, weight_BT, 0.0))
    loss = metrics["policy_loss"] = -jnp.sum(weight_BT * objective_BT)
    if ref_logprobs_BT is not None:
        kl = KL_ESTIMATORS[kl_estimator]
        kl_BT = kl(logprobs_BT, jax.lax.stop_gradient(masked(ref_logprobs_BT)))
        metrics["kl"] = jnp.sum(weight_BT * kl_BT)
        loss = loss + kl_coef * metrics["kl"] if kl_coef else loss
    if entropy_BT is not None:
        metrics["entropy"] = jnp.sum(weight_BT * masked(entropy_BT))
        loss = loss - entropy_coef * metrics["entropy"] if entropy_coef else loss
    return loss, metrics


def _check(algorithm: str, dual_clip: float | None, kl_estimator: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is unknown: use one of {', '.join(ALGORITHMS)}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator {kl_estimator!r} is unknown: use one of {', '.join(KL_ESTIMATORS)}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip {dual_clip} must be above 1, or None for no dual clip")


def _check_needs(
    kl_coef: float,
    ref_logprobs_BT: jax.Array | None,
    importance_cap: float | None,
    sampler_logprobs_BT: jax.Array | None,
    entropy_coef: float,
    entropy_BT: jax.Array | None,
) -> None:
    if kl_coef and ref_logprobs_BT is None:
        raise ValueError(f"kl_coef is {kl_coef}, which needs ref_logprobs_BT; give them, or set it to 0")
    if entropy_coef and entropy_BT is None:
        raise ValueError(f"entropy_coef is {entropy_coef}, which needs entropy_BT; give it, or set it to 0")
    if importance_cap is not None and (importance_cap <= 0 or sampler_logprobs_BT is None):
        raise ValueError(
            f"importance_cap is {importance_cap}: it must be above 0 with sampler_logprobs_BT given, or None"
        )


def _clipped_objective(
    ratio_BT: jax.Array, advantages_BT: jax.Array, clip_low: float, clip_high: float, dual_clip: float | None
) -> jax.Array:
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    objective_BT = jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    if dual_clip is None:
        return objective_BT
    floored_BT = jnp.maximum(objective_BT, dual_clip * advantages_BT)
    return jnp.where(advantages_BT < 0, floored_BT, objective_BT)


def _sequence_mean(x_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Each token's x replaced by the mean of x over the masked tokens of its sequence; x is 0 elsewhere."""
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros(mask_BT.shape, jnp.int32)
    chex.assert_equal_shape([x_BT, segment_ids_BT])
    length = mask_BT.shape[1]

    def of_row(x_T: jax.Array, mask_T: jax.Array, ids_T: jax.Array) -> jax.Array:
        slots_T = jnp.searchsorted(jnp.sort(ids_T), ids_T)  # ids may be any integers; slots are below T
        sums = jax.ops.segment_sum(x_T, slots_T, length)
        counts = jax.ops.segment_sum(mask_T.astype(jnp.float32), slots_T, length)
        return (sums / jnp.maximum(counts, 1.0))[slots_T]

    return jnp.where(mask_BT, jax.vmap(of_row)(x_BT, mask_BT, segment_ids_BT), 0.0)


def _ratio_metrics(
    ratio_BT: jax.Array,
    advantages_BT: jax.Array,
    weight_BT: jax.Array,
    mask_BT: jax.Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> dict[str, jax.Array]:
    def weight_where(condition_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(condition_BT, weight_BT, 0.0))

    highest = jnp.inf if dual_clip is None else dual_clip
    return {
        "weight": jnp.sum(weight_BT),
        "ratio": jnp.sum(weight_BT * ratio_BT),
        "ratio_min": jnp.min(jnp.where(mask_BT, ratio_BT, jnp.inf)),
        "ratio_max": jnp.max(jnp.where(mask_BT, ratio_BT, -jnp.inf)),
        "clip_low": weight_where((advantages_BT < 0) & (ratio_BT < 1.0 - clip_low)),
        "clip_high": weight_where((advantages_BT > 0) & (ratio_BT > 1.0 + clip_high)),
        "dual_clip": weight_where((advantages_BT < 0) & (ratio_BT > highest)),
    }
