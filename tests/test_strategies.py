"""Each mixing strategy against loops in NumPy float64: the token written and the embedding fed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo import mixture as mx
from ngrpo_jax.algo import sampling
from ngrpo_jax.algo.mixture import Mixing, embed
from ngrpo_jax.algo.neighbors import METRICS, neighbor_table

V, D, B = 23, 6, 12
TEMPERATURE = 0.7
OUT = (3, 8, 15, 20)  # kept out of mixing, where a test keeps any
MIXINGS = {
    **{f"neighbor by {metric}": Mixing("neighbor", k=3, metric=metric) for metric in METRICS},
    "neighbor by probabilities": Mixing("neighbor", k=4, weights="probs"),
    "neighbor, sampled token": Mixing("neighbor", k=2, token="sampled"),
    "soft": Mixing("soft", k=4),
    "gumbel": Mixing("gumbel", k=4),
    "noise": Mixing("noise", sigma=0.4),
}
next_input = jax.jit(mx.next_input, static_argnums=0)


@pytest.fixture(scope="module")
def embedding():
    return np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)


def _step(embedding, size=B, seed=1, k=3, metric="cosine", **truncation):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(size, V)) * 2, jnp.float32)
    truncated = sampling.truncate(logits, **truncation)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(size))
    return mx.StepContext(
        logits,
        truncated,
        sampling.sample(truncated, jnp.asarray(rng.random(size), jnp.float32)),
        jax.random.key_data(keys),
        jnp.asarray(rng.integers(0, 99, size), jnp.int32),
        neighbor_table(embedding, k, metric=metric),
        TEMPERATURE,
    )


def _softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x))
    return x / x.sum()


def _candidates(rows, anchor, k, metric):
    """The anchor, then the k - 1 rows nearest to it, each found by itself: no table, no symmetry."""
    nearness = {
        "cosine": lambda row, other: row @ other / np.sqrt((row @ row) * (other @ other)),
        "dot": lambda row, other: row @ other,
        "l2": lambda row, other: -np.sqrt(((row - other) ** 2).sum()),
        "l1": lambda row, other: -np.abs(row - other).sum(),
    }[metric]
    others = sorted(set(range(len(rows))) - {anchor}, key=lambda i: -nearness(rows[anchor], rows[i]))
    return [anchor, *others[: k - 1]]


def _key(step, row, stream):
    return jax.random.fold_in(jax.random.wrap_key_data(step.keys_B2[row]), stream)


def _oracle(mixing, step, row, embedding):
    """(anchor, written token, input embedding [D]) of one row, all in float64 but the random bits."""
    logits = np.asarray(step.logits_BV[row], np.float64)
    rows = embedding.astype(np.float64)
    token, position, out = int(step.token_B[row]), int(step.position_B[row]), set(mixing.keep_out_ids)
    best = int(np.argmax(logits))
    if mixing.strategy == "neighbor":
        ids = _candidates(rows, best, mixing.k, mixing.metric)
        scores = logits[ids] if mixing.weights == "logits" else _softmax(logits)[ids] / TEMPERATURE
        return best, best if mixing.token == "anchor" else token, _softmax(scores) @ rows[ids]
    if mixing.strategy == "soft":
        ids = [i for i in np.argsort(-logits, kind="stable") if i not in out][: mixing.k]
        p = _softmax(logits)[ids]
        return best, best, (p / p.sum()) @ rows[ids]
    if mixing.strategy == "noise":
        key = jax.random.fold_in(_key(step, row, 2**32 - 1), position)
        normal = np.asarray(jax.random.normal(key, (D,)), np.float64)
        return token, token, rows[token] + mixing.sigma * np.sqrt(np.mean(rows[token] ** 2)) * normal
    key = jax.random.fold_in(_key(step, row, 2**32 - 2), position)
    u = np.asarray(jax.random.uniform(key, (2 * mixing.k - 1,)), np.float64)
    truncated = np.asarray(step.truncated_logits_BV[row], np.float64)
    left, ids, values, ceiling = [i for i in range(V) if np.isfinite(truncated[i])], [], [], np.inf
    for c in range(min(mixing.k, len(left))):
        mass = np.exp(truncated[left])
        if c == 0:
            chosen = token
        else:
            chosen = left[int(np.searchsorted(np.cumsum(mass), u[mixing.k + c - 1] * mass.sum(), "right"))]
        # A Gumbel around log Σ mass, below the ceiling: its distribution function is exp(-Σ mass · e^-x).
        ceiling = -np.log(np.exp(-ceiling) - np.log(u[c]) / mass.sum())
        left.remove(chosen)
        ids.append(chosen)
        values.append(ceiling if c == 0 or chosen not in out else -np.inf)
    return token, token, _softmax(values) @ rows[ids]


@pytest.mark.parametrize("keep_out_ids", [(), OUT], ids=["all", "some kept out"])
@pytest.mark.parametrize("name", MIXINGS)
def test_input_embedding_and_token_of(name, keep_out_ids, embedding):
    mixing = dataclasses.replace(MIXINGS[name], keep_out_ids=keep_out_ids)
    step = _step(embedding, 4 * B, k=mixing.k, metric=mixing.metric)
    gate = np.arange(4 * B) % 4 != 0
    token, mixture, mixed = next_input(mixing, step, jnp.asarray(gate))
    assert mixture.ids.shape == mixture.weights.shape == (4 * B, mixing.candidates)
    np.testing.assert_allclose(np.asarray(mixture.weights).sum(-1), 1, rtol=1e-6)
    fed = embed(embedding, mixture)
    kept = 0
    for row in range(4 * B):
        anchor, written, expected = _oracle(mixing, step, row, embedding)
        kept += gate[row] and anchor in keep_out_ids
        if not gate[row] or anchor in keep_out_ids:
            written = int(step.token_B[row])
            expected = embedding[written]
        assert mixed[row] == (gate[row] and anchor not in keep_out_ids)
        assert token[row] == written
        np.testing.assert_allclose(fed[row], expected, rtol=2e-4, atol=2e-5)
    assert bool(kept) == bool(keep_out_ids) and mixed.sum() > B


def test_metrics_differ_on_these_rows(embedding):
    """Where all metrics had the same neighbours, one oracle for each would prove nothing."""
    rows = embedding.astype(np.float64)
    found = [[_candidates(rows, anchor, 3, metric) for anchor in range(V)] for metric in METRICS]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_a_step_that_is_not_mixed_is_exactly_the_ordinary_one(embedding):
    for mixing in (*MIXINGS.values(), Mixing("none")):
        step = _step(embedding, k=mixing.k)
        token, mixture, mixed = next_input(mixing, step, jnp.zeros(B, bool))
        np.testing.assert_array_equal(token, step.token_B)
        np.testing.assert_array_equal(embed(embedding, mixture), embedding[step.token_B])
        assert not mixed.any()


def test_soft_over_the_whole_vocabulary_is_the_expected_embedding(embedding):
    step = _step(embedding)
    _, mixture, _ = next_input(Mixing("soft", k=V), step, jnp.ones(B, bool))
    expected = np.stack([_softmax(row) for row in step.logits_BV]) @ embedding
    np.testing.assert_allclose(embed(embedding, mixture), expected, rtol=1e-4, atol=1e-5)


# ---- Gumbel: top-down sampling against Gumbel numbers for the whole vocabulary


def _many(logits, k, count):
    """Ids and weights of `count` Gumbel steps from the same logits."""
    step = _step(np.zeros((V, D), np.float32), count)
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    uniforms = jnp.asarray(np.random.default_rng(5).random(count), jnp.float32)
    step = step._replace(
        logits_BV=logits, truncated_logits_BV=logits, token_B=sampling.sample(logits, uniforms)
    )
    _, mixture, _ = next_input(Mixing("gumbel", k=k), step, jnp.ones(count, bool))
    return np.asarray(mixture.ids), np.asarray(mixture.weights, np.float64)


def test_gumbel_is_distributed_as_the_perturbed_top_k():
    logits, k, count = np.array([1.5, 0.2, -1.0, 0.9, -0.3]), 3, 60_000
    ids, weights = _many(logits, k, count)
    values = logits + np.random.default_rng(6).gumbel(size=(count, 5))
    expected_ids = np.argsort(-values, axis=1)[:, :k]
    top = np.take_along_axis(values, expected_ids, 1)
    expected = np.exp(top - top[:, :1]) / np.exp(top - top[:, :1]).sum(1, keepdims=True)
    for left in range(5):
        for right in range(5):
            seen = np.mean((ids[:, 0] == left) & (ids[:, 1] == right))
            wanted = np.mean((expected_ids[:, 0] == left) & (expected_ids[:, 1] == right))
            assert abs(seen - wanted) < 5 * np.sqrt(2 * (wanted + 1e-4) / count)
    for c in range(k):  # the weights' distributions, and not their means alone
        quantiles = np.linspace(0.02, 0.98, 25)
        np.testing.assert_allclose(
            np.quantile(weights[:, c], quantiles), np.quantile(expected[:, c], quantiles), atol=0.012
        )
    first = ids[:, 0] == 0
    assert abs(weights[first, 0].mean() - expected[expected_ids[:, 0] == 0, 0].mean()) < 0.005


def test_gumbel_writes_a_token_sampled_from_p():
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    ids, _ = _many(logits, 2, 40_000)
    np.testing.assert_allclose(np.bincount(ids[:, 0], minlength=4) / 40_000, _softmax(logits), atol=0.012)


def test_gumbel_stays_within_the_nucleus_even_where_that_is_smaller_than_k(embedding):
    step = _step(embedding, 64, top_k=2)
    _, mixture, _ = next_input(Mixing("gumbel", k=4), step, jnp.ones(64, bool))
    for row in range(64):
        allowed = set(np.flatnonzero(np.isfinite(step.truncated_logits_BV[row])))
        assert set(np.asarray(mixture.ids[row])) == allowed
        np.testing.assert_array_equal(mixture.weights[row, 2:], 0)
        assert np.isfinite(mixture.weights[row]).all() and mixture.weights[row, 0] > mixture.weights[row, 1]


# ---- randomness of their own


def test_noise_and_gumbel_have_random_streams_of_their_own(embedding):
    """The noise of a step must not depend on the uniform number that sampled its token."""
    step = _step(embedding)._replace(position_B=jnp.zeros(B, jnp.int32))
    _, mixture, _ = next_input(MIXINGS["noise"], step, jnp.ones(B, bool))
    ordinary = {tuple(np.asarray(key)) for key in step.keys_B2}
    assert not ordinary & {tuple(np.asarray(key)) for key in mixture.noise.key_data}
    np.testing.assert_array_equal(mixture.noise.position, 0)
    np.testing.assert_array_equal(mixture.noise.scale, np.float32(0.4))
    later = step._replace(position_B=step.position_B + 1)
    moved = next_input(MIXINGS["noise"], later, jnp.ones(B, bool))[1]
    np.testing.assert_array_equal(moved.noise.key_data, mixture.noise.key_data)
    assert (np.asarray(embed(embedding, moved)) != np.asarray(embed(embedding, mixture))).all()
    weights = [next_input(MIXINGS["gumbel"], d, jnp.ones(B, bool))[1].weights for d in (step, later)]
    assert (np.asarray(weights[0]) != np.asarray(weights[1])).any(-1).all()


def test_more_candidates_than_tokens_are_refused(embedding):
    with pytest.raises(ValueError, match="mixing k is 24, but there are only 23 rows"):
        mx.next_input(Mixing("soft", k=24), _step(embedding), jnp.ones(B, bool))


def test_neighbor_needs_its_table(embedding):
    with pytest.raises(ValueError, match="needs a neighbour table"):
        mx.next_input(Mixing(), _step(embedding)._replace(table_VC=None), jnp.ones(B, bool))


def test_a_new_strategy_is_one_entry(monkeypatch, embedding):
    """What `Mixing` says of it follows from the entry, and it is fed and refused like the others."""

    def second(mixing, step):
        ids_B2 = jax.lax.top_k(step.logits_BV, 2)[1].astype(jnp.int32)
        mixture = mx.Mixture(ids_B2, jnp.full(ids_B2.shape, 0.5, jnp.float32))
        return mx.Proposal(ids_B2[:, 0], ids_B2[:, 1], mixture)

    with pytest.raises(ValueError, match="strategy 'second' is unknown"):
        Mixing("second")
    monkeypatch.setitem(mx.STRATEGIES, "second", mx.Strategy(second, frozenset({"k"}), uses_table=True))
    mixing, step = Mixing("second", k=2, keep_out_ids=OUT), _step(embedding, 40)
    assert (mixing.mixes, mixing.uses_table, mixing.noisy, mixing.candidates) == (True, True, False, 2)
    token, mixture, mixed = mx.next_input(mixing, step, jnp.ones(40, bool))
    order = np.argsort(-np.asarray(step.logits_BV), axis=1)
    kept_out = np.isin(order[:, 0], OUT)
    assert kept_out.any()
    np.testing.assert_array_equal(mixed, ~kept_out)
    np.testing.assert_array_equal(token, np.where(kept_out, step.token_B, order[:, 1]))
    expected = np.where(kept_out[:, None], embedding[step.token_B], embedding[order[:, :2]].mean(1))
    np.testing.assert_allclose(embed(embedding, mixture), expected, rtol=1e-6, atol=1e-6)
