"""Mixtures against loops in NumPy float64: embedding, weights, noise, the end of mixing, the settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo import mixture as mx
from ngrpo_jax.algo.neighbors import neighbor_table

V, D = 23, 6
embed = jax.jit(mx.embed)


@pytest.fixture
def embedding():
    return np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)


def _random_mixture(shape=(2, 5), size=3, seed=1):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(size), size=shape).astype(np.float32)
    return mx.Mixture(jnp.asarray(rng.integers(0, V, (*shape, size)), jnp.int32), jnp.asarray(weights))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_hot_is_the_token_with_weight_one(size):
    mixture = mx.one_hot(np.array([[3, 0], [7, 22]]), size)
    assert mixture.ids.shape == mixture.weights.shape == (2, 2, size)
    assert mixture.ids.dtype == jnp.int32 and mixture.weights.dtype == jnp.float32
    np.testing.assert_array_equal(mixture.ids[..., 0], [[3, 0], [7, 22]])
    np.testing.assert_array_equal(mixture.weights[..., 0], 1)
    np.testing.assert_array_equal(mixture.weights[..., 1:], 0)
    assert mixture.noise is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embed_of_an_ordinary_token_is_exactly_its_row_eq5(embedding, dtype):
    table = jnp.asarray(embedding, dtype).at[4].set(jnp.nan)
    ids = np.array([[1, 22, 0], [9, 9, 3]])
    rows = embed(table, mx.one_hot(ids, 3))
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, table[ids])


def test_embed_is_the_weighted_sum_eq10(embedding):
    mixture = _random_mixture()
    ids, weights = np.asarray(mixture.ids), np.asarray(mixture.weights, np.float64)
    expected = np.zeros((2, 5, D))
    for i in np.ndindex(2, 5):
        for c in range(3):
            expected[i] += weights[i][c] * embedding[ids[i][c]].astype(np.float64)
    np.testing.assert_allclose(embed(embedding, mixture), expected, rtol=1e-6, atol=1e-6)


def test_embed_sums_in_float32_whatever_the_embedding(embedding):
    table = jnp.asarray(embedding, jnp.bfloat16)
    mixture = _random_mixture()
    exact = embed(table.astype(jnp.float32), mixture)
    np.testing.assert_array_equal(embed(table, mixture), exact.astype(jnp.bfloat16))


def test_embed_gradient_reaches_every_candidate_and_no_weight(embedding):
    mixture = mx.Mixture(jnp.array([[2, 5, 5]]), jnp.array([[0.5, 0.3, 0.2]]))
    direction = np.arange(1.0, D + 1, dtype=np.float32)

    def total(table, weights):
        return jnp.sum(embed(table, mixture._replace(weights=weights)) * direction[None, :])

    to_table, to_weights = jax.grad(total, argnums=(0, 1))(jnp.asarray(embedding), mixture.weights)
    expected = np.zeros((V, D))
    expected[2], expected[5] = 0.5 * direction, 0.5 * direction
    np.testing.assert_allclose(to_table, expected, rtol=1e-6)
    np.testing.assert_array_equal(to_weights, 0)


def test_embed_never_builds_all_candidates_at_once(embedding):
    shapes = []

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            shapes.extend(v.aval.shape for v in equation.outvars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    collect(getattr(inner, "jaxpr", inner))

    collect(jax.make_jaxpr(mx.embed)(embedding, _random_mixture()).jaxpr)
    assert (2, 5, D) in shapes and (2, 5, 3, D) not in shapes


# ---- noise


def _noisy(ids, positions, scale, seed=7):
    shape = np.shape(ids)
    key_data = jnp.broadcast_to(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")), (*shape, 2))
    scales = jnp.full(shape, scale, jnp.float32)
    return mx.one_hot(ids, 1)._replace(noise=mx.Noise(key_data, jnp.asarray(positions, jnp.int32), scales))


def test_noise_is_scale_times_rms_times_a_normal_of_key_and_position(embedding):
    ids, positions = np.array([[4, 8]]), np.array([[0, 11]])
    rows = embed(embedding, _noisy(ids, positions, 0.33))
    for t in range(2):
        row = embedding[ids[0, t]]
        key = jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), positions[0, t])
        normal = np.asarray(jax.random.normal(key, (D,)))
        np.testing.assert_allclose(rows[0, t], row + 0.33 * np.sqrt(np.mean(row**2)) * normal, rtol=1e-5)


def test_noise_of_scale_zero_leaves_the_row(embedding):
    rows = embed(embedding, _noisy(np.array([3, 1]), np.array([0, 1]), 0.0))
    np.testing.assert_array_equal(rows, embedding[[3, 1]])


def test_noise_does_not_depend_on_where_the_token_is_placed(embedding):
    mixture = _noisy(np.array([[4, 8, 2]]), np.array([[5, 6, 7]]), 0.33)
    moved = jax.tree.map(lambda x: x[:, ::-1].reshape(3, 1, *x.shape[2:]), mixture)
    whole, apart = embed(embedding, mixture), embed(embedding, moved)
    np.testing.assert_array_equal(whole[0, ::-1], apart[:, 0])


def test_noise_rms_is_constant_in_the_gradient(embedding):
    gradient = jax.grad(lambda table: jnp.sum(embed(table, _noisy(np.array([4]), np.array([2]), 0.33))))(
        jnp.asarray(embedding)
    )
    np.testing.assert_allclose(gradient[4], np.ones(D), rtol=1e-6)


def test_noise_has_its_scale():
    table = np.random.default_rng(3).normal(size=(2, 4096)).astype(np.float32)
    noise = np.asarray(embed(table, _noisy(np.array([1]), np.array([9]), 0.33)))[0] - table[1]
    assert abs(noise.std() / np.sqrt(np.mean(table[1] ** 2)) - 0.33) < 0.02
    assert abs(noise.mean()) < 0.02


# ---- the neighbour strategy


def test_neighbor_mixture_eq6_to_eq9(embedding):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, V)).astype(np.float32) * 3
    table = np.asarray(neighbor_table(embedding, 3))
    mixture = jax.jit(mx.neighbor_mixture)(logits, table)
    anchors = logits.argmax(-1)
    np.testing.assert_array_equal(mixture.ids, table[anchors])
    np.testing.assert_array_equal(mixture.ids[:, 0], anchors)
    chosen = np.take_along_axis(logits.astype(np.float64), table[anchors], 1)
    expected = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    np.testing.assert_allclose(mixture.weights, expected, rtol=1e-5)
    assert mixture.ids.dtype == jnp.int32 and mixture.weights.dtype == jnp.float32


def test_neighbor_mixture_with_k_one_is_the_greedy_token(embedding):
    logits = np.random.default_rng(2).normal(size=(4, V)).astype(np.float32)
    mixture = mx.neighbor_mixture(logits, neighbor_table(embedding, 1))
    np.testing.assert_array_equal(mixture.ids[:, 0], logits.argmax(-1))
    np.testing.assert_array_equal(mixture.weights, 1)


def test_neighbor_mixture_by_probabilities_is_the_releases(embedding):
    """Probabilities taken for logits: 0.58, 0.21, 0.21 where (9) gives all but 1, 0, 0."""
    logits = np.zeros((1, V), np.float32)
    logits[0, 5] = 30
    table = np.asarray(neighbor_table(embedding, 3))
    weights = mx.neighbor_mixture(logits, table, weights="probs").weights
    np.testing.assert_allclose(weights[0], np.exp([1, 0, 0]) / np.exp([1, 0, 0]).sum(), rtol=1e-5)
    np.testing.assert_allclose(weights[0], [0.58, 0.21, 0.21], atol=0.005)
    logits = np.random.default_rng(4).normal(size=(4, V)).astype(np.float32)
    mixture = mx.neighbor_mixture(logits, table, weights="probs", temperature=0.7)
    exact = logits.astype(np.float64)
    p = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    chosen = np.exp(np.take_along_axis(p, np.asarray(mixture.ids), 1) / 0.7)
    np.testing.assert_allclose(mixture.weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


def test_neighbor_mixture_of_equal_largest_logits_anchors_the_lower_id():
    logits = np.zeros((1, 5), np.float32)
    logits[0, [1, 3]] = 2
    table = np.array([[0, 1], [1, 4], [2, 1], [3, 1], [4, 1]], np.int32)
    np.testing.assert_array_equal(mx.neighbor_mixture(logits, table).ids, [[1, 4]])


def test_neighbor_mixture_gives_an_impossible_candidate_no_weight():
    logits = np.array([[3.0, -np.inf, 1.0]], np.float32)
    mixture = mx.neighbor_mixture(logits, np.array([[0, 1], [1, 0], [2, 0]], np.int32))
    np.testing.assert_array_equal(mixture.weights, [[1, 0]])


def test_cosine_to_anchor_appendix_e(embedding):
    table = embedding.copy()
    table[0] = 0
    mixture = _random_mixture()
    mixture = mixture._replace(ids=mixture.ids.at[0, 0].set(0).at[0, 1].set(jnp.array([4, 6, 6])))
    cosine = mx.cosine_to_anchor(table, mixture)
    mixed = np.asarray(embed(table, mixture), np.float64)
    for i in np.ndindex(2, 5):
        anchor = table[mixture.ids[i][0]].astype(np.float64)
        norms = np.linalg.norm(anchor) * np.linalg.norm(mixed[i])
        assert abs(np.asarray(cosine)[i] - (anchor @ mixed[i] / norms if norms else 0.0)) < 1e-6
    np.testing.assert_allclose(mx.cosine_to_anchor(table, mx.one_hot(np.array([1, 5]), 2)), 1, rtol=1e-6)


# ---- the end of mixing


def _ends(until_ids, tokens):
    """After which response tokens mixing has just been ended, feeding tails as a decode loop would."""
    tail = jnp.full((1, mx.tail_length(until_ids)), -1, jnp.int32)
    ends = []
    for token in tokens:
        tail = jnp.concatenate([tail, jnp.array([[token]], jnp.int32)], axis=1)[:, 1:]
        ends.append(bool(mx.completed(until_ids, tail)[0]))
    return ends


def test_until_ids_single_id():
    assert mx.tail_length((9,)) == 1
    assert _ends((9,), [1, 9, 2]) == [False, True, False]


def test_until_ids_sequence_must_be_consecutive_and_in_order():
    assert mx.tail_length(((1, 2, 3),)) == 3
    assert _ends(((1, 2, 3),), [1, 2, 4, 1, 2, 3, 3]) == [False, False, False, False, False, True, False]
    assert _ends(((1, 2),), [2, 1, 1, 2]) == [False, False, False, True]


def test_until_ids_several_entries_any_of_them():
    until = (9, (1, 2), (4, 4, 4))
    assert mx.tail_length(until) == 3
    assert _ends(until, [1, 2, 9, 4, 4, 4]) == [False, True, True, False, False, True]


def test_until_ids_is_not_matched_across_the_end_of_the_prompt():
    assert _ends(((1, 2),), [2]) == [False]  # the prompt may have ended in 1
    assert _ends(((0, 0),), [0]) == [False]


def test_until_ids_empty_never_ends():
    assert mx.tail_length(()) == 0
    assert _ends((), [1, 2, 3]) == [False] * 3


def test_completed_rows_are_independent_inside_jit():
    tails = jnp.array([[-1, 5], [1, 2], [2, 1]])
    done = jax.jit(mx.completed, static_argnums=0)(((1, 2), 5), tails)
    np.testing.assert_array_equal(done, [True, True, False])


# ---- the settings


def test_mixing_defaults_are_the_papers():
    mixing = mx.Mixing()
    assert dataclasses.astuple(mixing)[:5] == ("neighbor", 0.1, 3, "cosine", ())
    assert dataclasses.astuple(mixing)[5:] == ("embedding", "logits", "anchor", 0.33, ())
    assert hash(mixing) == hash(mx.Mixing())
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixing.rate = 0.5


@pytest.mark.parametrize(
    "field, value",
    [
        ("strategy", "gumbo"),
        ("rate", -0.1),
        ("rate", 1.5),
        ("rate", float("nan")),
        ("k", 0),
        ("metric", "euclid"),
        ("table", "output"),
        ("weights", "logit"),
        ("token", "argmax"),
        ("sigma", -0.1),
        ("sigma", float("nan")),
        ("keep_out_ids", (-1,)),
        ("keep_out_ids", ("7",)),
        ("until_ids", ((),)),
        ("until_ids", (-1,)),
        ("until_ids", ([1, 2],)),
    ],
)
def test_mixing_refuses_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        mx.Mixing(**{field: value})
