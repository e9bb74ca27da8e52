"""Advantages, KL and policy losses against loops in NumPy float64; masks, segments, gradients, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo import metrics, objectives
from ngrpo_jax.algo.objectives import group_advantages, kl_k3

policy_loss = jax.jit(
    objectives.policy_loss,
    static_argnames=(
        "algorithm",
        "clip_low",
        "clip_high",
        "dual_clip",
        "kl_coef",
        "kl_estimator",
        "importance_cap",
        "entropy_coef",
    ),
)

B, T = 4, 7


@pytest.fixture
def batch():
    """Log-ratios wide enough to be clipped on both sides, both signs of advantage, ragged responses."""
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(B, T))
    drift = np.array([0.3, -0.3, 0.5, 0.0])[:, None]
    new = old + drift + rng.normal(size=(B, T)) * 0.8
    weight = rng.random((B, T)) * (np.arange(T)[None, :] < np.array([7, 5, 3, 1])[:, None])
    weight[0, 2] = 0
    return dict(
        logprobs_BT=new.astype(np.float32),
        old_logprobs_BT=old.astype(np.float32),
        advantages=np.float32([1.2, -0.7, -1.5, 0.4]),
        weight_BT=(weight / weight.sum()).astype(np.float32),
        ref_logprobs_BT=(old + rng.normal(size=(B, T)) * 0.3).astype(np.float32),
    )


def _kl(logprob, ref, estimator):
    q = float(ref) - logprob
    return {"k1": -q, "k2": q * q / 2, "k3": np.exp(q) - q - 1}[estimator]


def _oracle(
    batch, *, low=0.2, high=0.2, dual=None, kl_coef=0.0, segments=None, sequence=False,
    estimator="k3", cap=None, entropy_coef=0.0,
):  # fmt: skip
    """(13) token by token; also the sums of weight that the metrics report."""
    new, old, weight = (
        batch[name].astype(np.float64) for name in ("logprobs_BT", "old_logprobs_BT", "weight_BT")
    )
    loss, sums = (
        0.0,
        dict(policy_loss=0.0, kl=0.0, kl_bounded=0.0, clip_low=0.0, clip_high=0.0, dual_clip=0.0, ratio=0.0),
    )
    ratios = []
    extras = dict(importance=0.0, importance_capped=0.0) if cap is not None else {}
    extras |= dict(entropy=0.0) if "entropy_BT" in batch else {}
    for i, t in zip(*np.nonzero(weight > 0), strict=True):
        advantage = float(
            batch["advantages"][i] if batch["advantages"].ndim == 1 else batch["advantages"][i, t]
        )
        members = [t]
        if sequence:
            members = [
                s for s in range(new.shape[1])
                if weight[i, s] > 0 and (segments is None or segments[i, s] == segments[i, t])
            ]  # fmt: skip
        ratio = np.exp(np.mean([new[i, s] - old[i, s] for s in members]))
        objective = min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
        w = weight[i, t]
        if dual is not None and advantage < 0:
            sums["dual_clip"] += w * (dual * advantage > objective)
            objective = max(objective, dual * advantage)
        if cap is not None:
            sampler = batch["sampler_logprobs_BT"].astype(np.float64)
            exact = np.exp(np.mean([old[i, s] - sampler[i, s] for s in members]))
            extras["importance"] += w * min(exact, cap)
            extras["importance_capped"] += w * (exact > cap)
            objective *= min(exact, cap)
        kl = _kl(new[i, t], batch["ref_logprobs_BT"][i, t], estimator)
        loss -= w * (objective - kl_coef * kl)
        if "entropy_BT" in batch:
            loss -= entropy_coef * w * float(batch["entropy_BT"][i, t])
            extras["entropy"] += w * float(batch["entropy_BT"][i, t])
        sums["policy_loss"] -= w * objective
        sums["kl"] += w * kl
        sums["ratio"] += w * ratio
        sums["clip_low"] += w * (advantage < 0 and ratio < 1 - low)
        sums["clip_high"] += w * (advantage > 0 and ratio > 1 + high)
        ratios.append(ratio)
    return loss, sums | extras | dict(weight=weight.sum(), ratio_min=min(ratios), ratio_max=max(ratios))


def _check(batch, oracle_settings, **settings):
    loss, metrics = policy_loss(**batch, **settings)
    expected_loss, expected_metrics = _oracle(batch, **oracle_settings)
    assert loss.shape == () and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-5, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name].shape == () and metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    return expected_metrics


# ---- advantages and KL


def test_group_advantages_eq12():
    rewards = np.array([[1, 0, 0, 1], [0, 0, 1, 0], [0.2, 0.9, 0.4, 0.1]], np.float32)
    mean, std = rewards.mean(1, keepdims=True), rewards.std(1, ddof=1, keepdims=True)
    advantages = group_advantages(rewards)
    assert advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, (rewards - mean) / (std + 1e-6), rtol=1e-5)
    np.testing.assert_allclose(group_advantages(rewards, scale_by_std=False), rewards - mean, rtol=1e-5)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_group_advantages_are_exactly_zero_without_variance(scale_by_std):
    rewards = np.array([[0.1] * 3, [1] * 3, [0] * 3], np.float32)  # the mean of three 0.1 is not 0.1
    np.testing.assert_array_equal(group_advantages(rewards, scale_by_std=scale_by_std), 0)


def test_varied_groups():
    rewards = np.array([[0.1] * 3, [1, 1, 0], [0] * 3], np.float32)
    np.testing.assert_array_equal(objectives.varied_groups(rewards), [False, True, False])


def test_overlong_penalty_is_daposs():
    """0 up to limit - interval, then linear, 1 at the limit (arXiv 2503.14476); cut off: all of it."""
    lengths = np.array([10, 60, 70, 80, 100, 100])
    stopped = np.array([True, True, True, True, True, False])
    soft = objectives.overlong_penalty(lengths, stopped, limit=100, interval=40, size=0.5)
    np.testing.assert_allclose(soft, 0.5 * np.array([0, 0, 0.25, 0.5, 1, 1]))
    hard = objectives.overlong_penalty(lengths, stopped, limit=100, interval=0, size=2.0)
    np.testing.assert_array_equal(hard, [0, 0, 0, 0, 0, 2])


def test_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(np.ones((3, 1)))


def test_kl_k3():
    rng = np.random.default_rng(1)
    logprobs, ref = (-rng.exponential(size=(3, 5)) for _ in range(2))
    q = ref - logprobs
    np.testing.assert_allclose(
        kl_k3(logprobs.astype(np.float32), ref.astype(np.float32)), np.exp(q) - q - 1, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(kl_k3(jnp.ones(3), jnp.ones(3)), 0)
    assert (kl_k3(jnp.zeros(9), jnp.linspace(-1e-3, 1e-3, 9)) >= 0).all()


def test_k3_and_its_gradient_are_finite_for_all_log_probabilities_and_exact_below_60():
    q = jnp.array([-1e20, -100.0, 0.0, 59.0, 60.0, 89.0, 1e4, 1e20])
    value, gradient = jax.vmap(jax.value_and_grad(lambda x: kl_k3(x, jnp.float32(0))))(-q)
    assert jnp.isfinite(value).all() and jnp.isfinite(gradient).all() and (value >= 0).all()
    # Descent moves no log-probability away from the reference's.
    assert (gradient * jnp.sign(q) <= 0).all()
    np.testing.assert_allclose(value[3], np.exp(59.0) - 60, rtol=1e-6)


def test_kl_k3_is_unbiased_for_the_kl_divergence():
    p, r = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    k3 = kl_k3(np.log(p).astype(np.float32), np.log(r).astype(np.float32))
    np.testing.assert_allclose((p * k3).sum(), (p * np.log(p / r)).sum(), rtol=1e-5)


# ---- GRPO


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4)])
def test_policy_loss_grpo_eq13(batch, low, high, dual, kl_coef):
    metrics = _check(
        batch,
        dict(low=low, high=high, dual=dual, kl_coef=kl_coef),
        clip_low=low, clip_high=high, dual_clip=dual, kl_coef=kl_coef,
    )  # fmt: skip
    assert metrics["clip_low"] > 0 and metrics["clip_high"] > 0 and (metrics["dual_clip"] > 0) == bool(dual)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_policy_loss_kl_estimators(batch, estimator):
    _check(batch, dict(kl_coef=0.3, estimator=estimator), kl_coef=0.3, kl_estimator=estimator)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_elementwise(estimator):
    """Against the formulas; k1 and k3 are unbiased for the divergence."""
    p, r = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    log_p, log_r = np.log(p).astype(np.float32), np.log(r).astype(np.float32)
    figure = objectives.KL_ESTIMATORS[estimator](log_p, log_r)
    expected = [_kl(a, b, estimator) for a, b in zip(np.log(p), np.log(r), strict=True)]
    np.testing.assert_allclose(figure, expected, rtol=1e-4)
    if estimator != "k2":
        np.testing.assert_allclose((p * figure).sum(), (p * np.log(p / r)).sum(), rtol=1e-5)


@pytest.mark.parametrize("cap", [0.9, 2.0])
@pytest.mark.parametrize("sequence", [False, True])
def test_truncated_importance_weights_of_trainer_against_sampler(batch, cap, sequence):
    """min(π_trainer / π_sampler, cap) on the clipped objective, and not on the KL; by sequence for GSPO."""
    noise = np.random.default_rng(7).normal(size=(B, T)) * 0.6
    batch["sampler_logprobs_BT"] = (batch["old_logprobs_BT"] + noise).astype(np.float32)
    metrics = _check(
        batch, dict(cap=cap, kl_coef=0.1, sequence=sequence),
        importance_cap=cap, kl_coef=0.1, algorithm="gspo" if sequence else "grpo",
    )  # fmt: skip
    assert sequence or metrics["importance_capped"] > 0
    constants = dict(sampler_logprobs_BT=batch.pop("sampler_logprobs_BT"))
    gradient = jax.grad(lambda c: policy_loss(**batch, **c, importance_cap=cap)[0])(constants)
    np.testing.assert_array_equal(gradient["sampler_logprobs_BT"], 0)


def test_importance_weights_are_one_where_sampler_and_trainer_agree(batch):
    plain = policy_loss(**batch)[0]
    weighted, metrics = policy_loss(**batch, sampler_logprobs_BT=batch["old_logprobs_BT"], importance_cap=1.0)
    assert plain == weighted and metrics["importance"] == metrics["weight"]
    assert metrics["importance_capped"] == 0


def test_entropy_bonus_and_its_gradient(batch):
    batch["entropy_BT"] = np.random.default_rng(8).random((B, T)).astype(np.float32)
    _check(batch, dict(entropy_coef=0.2), entropy_coef=0.2)
    gradient = jax.grad(lambda h: policy_loss(**batch | dict(entropy_BT=h), entropy_coef=0.2)[0])(
        batch["entropy_BT"]
    )
    np.testing.assert_allclose(gradient, -0.2 * batch["weight_BT"], rtol=1e-6)
    assert policy_loss(**batch)[1]["entropy"] > 0, "reported whatever its coefficient"


def test_advantages_may_differ_by_token(batch):
    batch["advantages"] = np.random.default_rng(2).normal(size=(B, T)).astype(np.float32)
    _check(batch, {})


def test_loss_at_ratio_one_is_minus_the_weighted_advantage(batch):
    batch["logprobs_BT"] = batch["old_logprobs_BT"]
    loss, metrics = policy_loss(**batch)
    np.testing.assert_allclose(loss, -(batch["weight_BT"] * batch["advantages"][:, None]).sum(), rtol=1e-5)
    assert (
        metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["clip_low"] == metrics["clip_high"] == 0
    )


def test_gradient_at_ratio_one_is_the_policy_gradient(batch):
    gradient = jax.grad(lambda x: policy_loss(**batch | dict(logprobs_BT=x))[0])(batch["old_logprobs_BT"])
    np.testing.assert_allclose(gradient, -batch["weight_BT"] * batch["advantages"][:, None], rtol=1e-5)


def test_clipped_tokens_have_no_gradient_and_pull_the_right_way_otherwise():
    ratio = np.float32([0.5, 1.1, 1.5, 4.0])
    for sign, alive in [(1, [1, 1, 0, 0]), (-1, [0, 1, 1, 0])]:
        gradient = jax.grad(
            lambda x, sign=sign: policy_loss(
                x, jnp.zeros((1, 4)), jnp.float32([sign]), jnp.ones((1, 4)), dual_clip=3.0
            )[0]
        )(jnp.log(ratio)[None, :])
        np.testing.assert_allclose(gradient[0], -sign * ratio * np.float32(alive), rtol=1e-5)


def test_kl_gradient(batch):
    batch["advantages"] = np.zeros(B, np.float32)
    gradient = jax.grad(lambda x: policy_loss(**batch | dict(logprobs_BT=x), kl_coef=0.1)[0])(
        batch["logprobs_BT"]
    )
    q = batch["ref_logprobs_BT"] - batch["logprobs_BT"]
    np.testing.assert_allclose(gradient, 0.1 * batch["weight_BT"] * (1 - np.exp(q)), rtol=1e-4, atol=1e-7)


def test_only_the_new_logprobs_get_gradient(batch):
    names = ("old_logprobs_BT", "advantages", "ref_logprobs_BT")
    constants = {name: batch.pop(name) for name in names}
    gradients = jax.grad(lambda c: policy_loss(**batch, **c, kl_coef=0.1)[0])(constants)
    for name in names:
        np.testing.assert_array_equal(gradients[name], 0, err_msg=name)


@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_extreme_log_ratios_leave_the_gradient_finite(algorithm):
    logprobs = jnp.float32([[300.0], [300.0], [-300.0], [-300.0]])
    advantages = jnp.float32([1, -1, 1, -1])
    loss, gradient = jax.value_and_grad(
        lambda x: policy_loss(x, jnp.zeros((4, 1)), advantages, jnp.ones((4, 1)), algorithm=algorithm)[0]
    )(logprobs)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


# ---- GSPO


@pytest.mark.parametrize("dual", [None, 1.2])
def test_policy_loss_gspo_one_sequence_a_row(batch, dual):
    metrics = _check(
        batch, dict(sequence=True, low=3e-4, high=4e-4, dual=dual, kl_coef=0.04),
        algorithm="gspo", clip_low=3e-4, clip_high=4e-4, dual_clip=dual, kl_coef=0.04,
    )  # fmt: skip
    assert metrics["clip_low"] + metrics["clip_high"] > 0


SEGMENTS = [
    [[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]],
    [[90, 90, 7, 7, 7, 8, 8], [7, 7, 7, 7, 7, -1, -1], [1, 2, 3, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5, 5]],
]


@pytest.mark.parametrize("segments", SEGMENTS)
def test_policy_loss_gspo_packed_segments(batch, segments):
    segments = np.array(segments, np.int32)
    by_segment = np.random.default_rng(3).normal(size=(B, 100)).astype(np.float32)
    batch["advantages"] = np.take_along_axis(by_segment, np.abs(segments), 1)
    _check(
        batch, dict(sequence=True, segments=segments, low=0.03, high=0.04),
        algorithm="gspo", clip_low=0.03, clip_high=0.04, segment_ids_BT=segments,
    )  # fmt: skip


def test_packing_does_not_change_gspo_nor_its_gradient(batch):
    settings = dict(algorithm="gspo", clip_low=0.3, clip_high=0.3, kl_coef=0.04)
    segments = np.array([[1] * T + [2] * T, [1] * T + [2] * T], np.int32)
    packed = {name: x.reshape(2, 2 * T) for name, x in batch.items() if name != "advantages"}
    packed["advantages"] = np.repeat(batch["advantages"], T).reshape(2, 2 * T)

    def loss(given, **extra):
        return jax.value_and_grad(
            lambda x: policy_loss(**given | dict(logprobs_BT=x), **settings, **extra)[0]
        )(given["logprobs_BT"])

    (apart, apart_grad), (together, together_grad) = loss(batch), loss(packed, segment_ids_BT=segments)
    np.testing.assert_allclose(apart, together, rtol=1e-6)
    np.testing.assert_allclose(apart_grad, together_grad.reshape(B, T), rtol=1e-5, atol=1e-8)


def test_gspo_gradient_flows_through_the_sequence_ratio(batch):
    gradient = jax.grad(
        lambda x: policy_loss(**batch | dict(logprobs_BT=x), algorithm="gspo", clip_low=0.99, clip_high=99.0)[
            0
        ]
    )(batch["logprobs_BT"])
    mask = batch["weight_BT"] > 0
    count = mask.sum(1, keepdims=True)
    log_ratio = (mask * (batch["logprobs_BT"] - batch["old_logprobs_BT"])).sum(1, keepdims=True) / count
    share = batch["weight_BT"].sum(1, keepdims=True)
    expected = -1.0 * mask * share / count * np.exp(log_ratio) * batch["advantages"][:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


# ---- masks and metrics


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_what_stands_where_nothing_counts_cannot_leak(batch, algorithm, garbage):
    settings = dict(algorithm=algorithm, dual_clip=3.0, kl_coef=0.1)
    batch["advantages"] = np.repeat(batch["advantages"], T).reshape(B, T)

    def run(given):
        return jax.value_and_grad(
            lambda x: policy_loss(**given | dict(logprobs_BT=x), **settings), has_aux=True
        )(given["logprobs_BT"])

    spoilt = {
        name: x if name == "weight_BT" else np.where(batch["weight_BT"] > 0, x, np.float32(garbage))
        for name, x in batch.items()
    }
    (loss, metrics), gradient = run(batch)
    (spoilt_loss, spoilt_metrics), spoilt_gradient = run(spoilt)
    np.testing.assert_array_equal(loss, spoilt_loss)
    np.testing.assert_array_equal(gradient, spoilt_gradient)
    assert (np.asarray(gradient)[batch["weight_BT"] == 0] == 0).all()
    for name in metrics:
        np.testing.assert_array_equal(metrics[name], spoilt_metrics[name], err_msg=name)


def test_loss_and_sums_add_over_microbatches(batch):
    settings = dict(dual_clip=1.5, kl_coef=0.1)
    loss, metrics = policy_loss(**batch, **settings)
    halves = [
        policy_loss(**{name: x[rows] for name, x in batch.items()}, **settings)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(loss, sum(half[0] for half in halves), rtol=1e-5)
    for name, value in metrics.items():
        parts = [half[1][name] for half in halves]
        combine = {"ratio_min": min, "ratio_max": max}.get(name, sum)
        np.testing.assert_allclose(value, combine(parts), rtol=1e-5, atol=1e-7, err_msg=name)


def _measured(batch, rows=slice(None), scale=1.0):
    """The typed metrics of some rows of the batch, with every term of the loss."""
    part = {name: x[rows] for name, x in batch.items()}
    old = part["old_logprobs_BT"]
    inputs = objectives.LossInputs(
        old, part["advantages"], scale * part["weight_BT"], part["ref_logprobs_BT"], old - 1.0
    )
    config = objectives.LossConfig(dual_clip=2.0, kl_coef=0.1, importance_cap=2.0, entropy_coef=0.2)
    return objectives.loss_and_metrics(part["logprobs_BT"], np.abs(old), inputs, config)[1]


def _values(measured):
    return {name: metrics.value([metric]) for name, metric in jax.device_get(measured).items()}


def test_metrics_of_parts_join_to_those_of_the_whole(batch):
    whole, halves = _measured(batch), [_measured(batch, rows) for rows in (slice(0, 2), slice(2, 4))]
    assert len(whole) == 13
    assert _values(metrics.combine(*halves)) == pytest.approx(_values(whole), rel=1e-5)
    assert _values(metrics.combine(metrics.empty(whole), halves[0])) == _values(halves[0])


def test_every_metric_but_the_loss_is_a_mean_or_an_extreme_whatever_the_weights_sum_to(batch):
    once, twice = _values(_measured(batch)), _values(_measured(batch, scale=2.0))
    assert twice.pop("loss") == pytest.approx(2 * once.pop("loss"))
    assert twice == pytest.approx(once)


def test_a_batch_without_responses_has_no_loss_and_neutral_extremes(batch):
    loss, metrics = policy_loss(**batch | dict(weight_BT=np.zeros((B, T), np.float32)), kl_coef=0.1)
    assert loss == 0 and metrics["weight"] == 0
    assert metrics["ratio_min"] == np.inf and metrics["ratio_max"] == -np.inf


def test_kl_is_reported_but_not_charged_at_coefficient_zero(batch):
    loss, metrics = policy_loss(**batch)
    reference = batch.pop("ref_logprobs_BT")
    assert loss == policy_loss(**batch)[0] and metrics["kl"] > 0
    assert "kl" not in policy_loss(**batch)[1] and reference is not None


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(algorithm="ppo"), "algorithm 'ppo'"),
        (dict(dual_clip=1.0), "dual_clip 1.0"),
        (dict(kl_coef=0.1, ref_logprobs_BT=None), "ref_logprobs_BT"),
        (dict(kl_estimator="k4"), "kl_estimator 'k4'"),
        (dict(importance_cap=2.0), "sampler_logprobs_BT"),
        (dict(entropy_coef=0.1), "entropy_BT"),
    ],
)
def test_bad_settings_are_named(batch, settings, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(**batch | settings)
