"""Sampling against a NumPy float64 inverse CDF on a grid of uniforms, and by chi-square; truncation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ngrpo_jax.algo import sampling
from ngrpo_jax.algo.sampling import greedy, scaled

truncate = jax.jit(sampling.truncate, static_argnames=("top_p", "top_k"))


@functools.partial(jax.jit, static_argnames=("top_p", "top_k"))
def sample(logits, uniforms, **truncation):
    return sampling.sample(sampling.truncate(logits, **truncation), uniforms)


def _logits(size, spread=2.0, seed=0, rows=1):
    return (np.random.default_rng(seed).normal(size=(rows, size)) * spread).astype(np.float32)


def _probabilities(logits, top_p=1.0, top_k=0):
    """The probabilities of one row in float64, by a full stable sort."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        reaches = np.cumsum(p[order]) >= top_p
        p[order[(np.argmax(reaches) if reaches.any() else len(p)) + 1 :]] = 0
        p /= p.sum()
    return p


def _grid(count):
    return (np.arange(count, dtype=np.float32) + 0.5) / count


def _assert_inverts(logits, count, **truncation):
    """Every uniform of a grid gives the token in whose part of the CDF it lies, up to float32 rounding."""
    uniforms = _grid(count)
    tokens = np.asarray(sample(np.broadcast_to(logits, (count, logits.shape[1])), uniforms, **truncation))
    p = _probabilities(logits[0], **truncation)
    upto = np.cumsum(p)
    assert (p[tokens] > 0).all()
    assert (uniforms <= upto[tokens] + 2e-6).all()
    assert (uniforms >= upto[tokens] - p[tokens] - 2e-6).all()
    return tokens


# Below a block, a block, whole blocks, blocks and a rest (the shortest and the longest), many blocks.
@pytest.mark.parametrize("size", [1, 256, 257, 511, 3001])
def test_sample_inverts_the_cdf_eq4(size):
    _assert_inverts(_logits(size), 997)


@pytest.mark.parametrize(
    "size, truncation",
    [
        (50, dict(top_k=5)),
        (50, dict(top_k=1000)),
        (50, dict(top_p=0.0)),
        (700, dict(top_p=0.95)),
        (700, dict(top_p=0.6, top_k=20)),
    ],
)
def test_truncated_sample_inverts_the_cdf_of_the_renormalised_probabilities(size, truncation):
    tokens = _assert_inverts(_logits(size), 499, **truncation)
    support = np.flatnonzero(_probabilities(_logits(size)[0], **truncation))
    if len(support) < 20:
        np.testing.assert_array_equal(np.unique(tokens), support)


@pytest.mark.parametrize("truncation", [dict(), dict(top_p=0.9)])
def test_sampled_tokens_have_their_probabilities_by_chi_square(truncation):
    count, size = 20_000, 400
    logits = _logits(size)
    uniforms = jax.random.uniform(jax.random.key(3), (count,))
    tokens = np.asarray(sample(np.broadcast_to(logits, (count, size)), uniforms, **truncation))
    p = _probabilities(logits[0], **truncation)
    often = p * count >= 5
    observed = np.bincount(tokens, minlength=size)
    seen, expected = observed[often], p[often] * count
    if not often[p > 0].all():
        seen = np.append(seen, observed[~often].sum())
        expected = np.append(expected, count * p[~often].sum())
    assert scipy.stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 0.01


@pytest.mark.parametrize("size", [1, 256, 257, 511, 3001])
def test_log_total_is_the_log_sum_exp(size):
    logits = _logits(size, spread=30.0, rows=4)
    expected = scipy.special.logsumexp(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(jax.jit(sampling.log_total)(logits), expected, rtol=3e-7, atol=3e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_log_total_is_not_finite_where_a_logit_is_bad_or_none_is_possible(bad):
    logits = _logits(300, rows=4)
    logits[1, 299], logits[2, :] = bad, -np.inf
    logits[3, 1:] = -np.inf
    assert np.isfinite(sampling.log_total(logits)).tolist() == [True, False, False, True]


def test_rows_are_independent():
    # Rows whose nucleus is found among the largest few, beside rows that must be searched.
    logits = np.concatenate([_logits(600, 4.0, rows=4), _logits(600, 0.1, rows=4)])
    uniforms = _grid(8)
    together = np.asarray(sample(logits, uniforms, top_p=0.9))
    for i in range(8):
        alone = sample(np.repeat(logits[i : i + 1], 8, axis=0), np.repeat(uniforms[i], 8), top_p=0.9)
        np.testing.assert_array_equal(alone, together[i])


@pytest.mark.parametrize("truncation", [dict(), dict(top_k=280, top_p=0.99)])
@pytest.mark.parametrize("size", [300, 515])
def test_impossible_tokens_are_never_sampled(size, truncation):
    logits = np.full((1, size), -np.inf, np.float32)
    logits[0, [3, 4, 270]] = [0.0, 1.0, -3.0]
    last_before_one = np.nextafter(np.float32(1), np.float32(0))
    uniforms = np.append(_grid(500), [0.0, last_before_one]).astype(np.float32)
    tokens = np.asarray(sample(np.broadcast_to(logits, (502, size)), uniforms, **truncation))
    assert set(tokens) == {3, 4, 270}
    assert tokens[-2] == 3 and tokens[-1] == 270


def test_the_ends_of_the_unit_interval_give_tokens_with_mass():
    logits = np.full((2, 1000), -200.0, np.float32)  # underflows to 0 everywhere but in the middle
    logits[:, 500] = 0
    uniforms = np.float32([0.0, np.nextafter(np.float32(1), np.float32(0))])
    np.testing.assert_array_equal(sample(logits, uniforms), [500, 500])


def test_huge_logits_do_not_overflow():
    logits = np.float32([[1e30, 1e30, -1e30]])
    tokens = sample(np.broadcast_to(logits, (10, 3)), _grid(10))
    np.testing.assert_array_equal(tokens, [0] * 5 + [1] * 5)


def test_no_token_without_mass_is_sampled_where_the_prefix_sum_rises_by_rounding():
    """A parallel prefix sum adds in another order for each entry, so it can rise where the mass is 0."""
    random, block = np.random.default_rng(0), 256
    of_block = random.normal(size=(32, 600)).astype(np.float32)
    of_block[random.random(of_block.shape) < 0.5] = -np.inf
    logits = np.full((32, 600 * block), -np.inf, np.float32)
    logits[:, ::block] = of_block  # one token in half of the blocks, none in the others
    mass = np.exp(of_block - of_block.max(-1, keepdims=True))
    upto = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(mass))
    total = np.asarray(jax.jit(lambda x: jnp.sum(x, axis=-1))(mass))
    rows, before = np.nonzero((upto[:, 1:] > upto[:, :-1]) & (mass[:, 1:] == 0))
    uniforms = upto[rows, before] / total[rows]
    target = uniforms * total[rows]
    hits = (target >= upto[rows, before]) & (target < upto[rows, before + 1])
    assert hits.sum() > 10, "no target lies where a prefix sum rises without mass: the test cannot fail"
    tokens = np.asarray(sample(logits[rows[hits]], uniforms[hits]))
    assert np.isfinite(logits[rows[hits], tokens]).all()


# ---- truncation


@pytest.mark.parametrize("size", [128, 129, 1000])
@pytest.mark.parametrize("top_p", [0.01, 0.9])
def test_nucleus_is_the_fewest_most_probable_tokens_that_reach_top_p(size, top_p):
    logits = np.concatenate([_logits(size, spread, rows=3) for spread in (0.1, 1.0, 6.0)])
    kept = np.isfinite(truncate(logits, top_p=top_p))
    for row, keep in zip(logits, kept, strict=True):
        p = _probabilities(row)
        assert p[keep].min() >= p[~keep].max(initial=0)
        assert p[keep].sum() >= top_p - 1e-6
        assert p[keep].sum() - p[keep].min() <= top_p + 1e-6


@pytest.mark.parametrize("top_p", [0.1, 0.7])  # within the 128 largest logits of each row, and beyond them
def test_nucleus_of_rows_with_many_equal_logits(top_p):
    logits = np.round(_logits(900, 1.0, rows=5), 1)
    kept = np.isfinite(truncate(logits, top_p=top_p))
    expected = np.stack([_probabilities(row, top_p) > 0 for row in logits])
    assert ((expected.sum(-1) < 128) == (top_p < 0.5)).all() and (expected.sum(-1) > 1).all()
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("size", [20, 1000])
@pytest.mark.parametrize("top_p, top_k, kept", [(0.25, 0, 0.25), (1.0, 5, None), (0.6, 5, 3)])
def test_ties_keep_the_lower_ids(size, top_p, top_k, kept):
    count = {0.25: size // 4, None: 5, 3: 3}[kept]
    finite = np.isfinite(truncate(np.zeros((1, size), np.float32), top_p=top_p, top_k=top_k))[0]
    np.testing.assert_array_equal(np.flatnonzero(finite), np.arange(count))


def test_ties_with_negative_and_mixed_logits_keep_the_lower_ids():
    logits = np.full((1, 500), -2.5, np.float32)
    logits[0, 499] = 1.0  # p = e^3.5 / (e^3.5 + 499): 0.0622
    finite = np.isfinite(truncate(logits, top_p=0.5))[0]
    p = _probabilities(logits[0])
    count = int(np.ceil((0.5 - p[499]) / p[0]))
    np.testing.assert_array_equal(np.flatnonzero(finite), [*range(count), 499])


def test_the_most_probable_token_is_always_kept():
    logits = _logits(300, rows=3)
    kept = np.isfinite(truncate(logits, top_p=1e-9))
    np.testing.assert_array_equal(kept.sum(-1), 1)
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))


def test_top_p_that_rounds_to_one_keeps_everything():
    assert np.isfinite(truncate(_logits(3000, 0.5), top_p=1 - 1e-12)).all()


def test_search_for_a_mass_that_rounding_put_out_of_reach_keeps_everything():
    logits = _logits(300, rows=2)
    mass = np.exp(logits - logits.max(-1, keepdims=True))
    value, last = sampling._search_nucleus_cut(jnp.asarray(logits), mass, mass.sum(-1) * np.float32(1.001))
    assert sampling._up_to(jnp.asarray(logits), value, last).all()


def test_nucleus_of_a_row_with_few_possible_tokens():
    logits = np.full((1, 400), -np.inf, np.float32)
    logits[0, [7, 300]] = 0
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(truncate(logits, top_p=0.9))[0]), [7, 300])


def test_top_k_comes_before_the_nucleus():
    logits = np.log(np.float32([[0.4, 0.3, 0.2, 0.1]]))
    # Of the two kept tokens the first has 4/7 = 0.57 ≥ 0.5; of all tokens it has only 0.4.
    np.testing.assert_array_equal(np.isfinite(truncate(logits, top_k=2, top_p=0.5)), [[1, 0, 0, 0]])
    np.testing.assert_array_equal(np.isfinite(truncate(logits, top_p=0.5)), [[1, 1, 0, 0]])


def test_kept_logits_are_unchanged_and_off_means_off():
    logits = _logits(300)
    np.testing.assert_array_equal(truncate(logits), logits)
    np.testing.assert_array_equal(truncate(logits, top_k=300), logits)
    kept = np.asarray(truncate(logits, top_p=0.8))
    np.testing.assert_array_equal(kept[np.isfinite(kept)], logits[np.isfinite(kept)])


@pytest.mark.parametrize("truncation", [dict(top_k=-1), dict(top_p=1.1), dict(top_p=-0.1)])
def test_bad_truncation_is_refused(truncation):
    with pytest.raises(ValueError, match="top_k"):
        sample(_logits(5), _grid(1), **truncation)


# ---- greedy and temperature


def test_greedy_takes_the_lower_id_of_equals():
    logits = np.float32([[0, 2, 1, 2], [-np.inf, -5, -5, -np.inf]])
    tokens = greedy(logits)
    np.testing.assert_array_equal(tokens, [1, 1])
    assert tokens.dtype == jnp.int32 and sample(logits, _grid(2)).dtype == jnp.int32


@pytest.mark.parametrize("size", [1, 255, 256, 257, 511, 3001])
def test_greedy_takes_the_lower_id_of_equals_within_and_between_blocks(size):
    logits = np.random.default_rng(size).integers(4, size=(64, size)).astype(np.float32)
    np.testing.assert_array_equal(greedy(logits), logits.argmax(axis=1))


def test_scaled_divides_in_float32_eq2():
    logits = jnp.asarray(_logits(9), jnp.bfloat16)
    assert scaled(logits, 0.7).dtype == jnp.float32
    np.testing.assert_array_equal(scaled(logits, 0.7), logits.astype(jnp.float32) / np.float32(0.7))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_scaled_refuses_a_temperature_not_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature"):
        scaled(jnp.zeros((1, 2)), temperature)
