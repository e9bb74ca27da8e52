"""The neighbour table against a float64 scan over all pairs; ties, twins, masks, zero rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo import neighbors as nb
from ngrpo_jax.algo.neighbors import METRICS, neighbor_table


def _scores(rows, metric):
    rows = np.asarray(rows, np.float64)
    if metric == "cosine":
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.where(norms > 0, norms, 1)
    if metric in ("cosine", "dot"):
        return (rows[:, None, :] * rows[None, :, :]).sum(-1)  # a matrix product would tell twins apart
    differences = rows[:, None, :] - rows[None, :, :]
    return -(np.abs(differences) if metric == "l1" else differences**2).sum(-1)


def _oracle(rows, k, metric, valid=None):
    """Sort every pair by (score, lower id); bit-identical rows have bit-identical scores here."""
    scores = _scores(rows, metric)
    valid = np.ones(len(rows), bool) if valid is None else valid
    table = np.empty((len(rows), k), np.int32)
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i and valid[j]]
        table[i] = [i, *sorted(others, key=lambda j: (-scores[i, j], j))[: k - 1]]
    return table


def _normal(size, width, seed=0):
    return np.random.default_rng(seed).normal(size=(size, width)).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size, width, k, block", [(37, 19, 4, 8), (9, 5, 9, 50)])
def test_neighbor_table_eq7_eq8(metric, size, width, k, block):
    rows = _normal(size, width)
    table = neighbor_table(rows, k, metric=metric, block=block)
    assert table.shape == (size, k) and table.dtype == jnp.int32
    np.testing.assert_array_equal(table, _oracle(rows, k, metric))


@pytest.mark.parametrize("block", [1, 1000])
def test_block_size_changes_nothing(block):
    rows = _normal(60, 8)
    np.testing.assert_array_equal(neighbor_table(rows, 4, block=block), neighbor_table(rows, 4))


@pytest.mark.parametrize("metric", METRICS)
def test_rows_not_valid_are_never_neighbours_but_have_some(metric):
    rows = _normal(30, 4)
    valid = np.random.default_rng(1).random(30) < 0.4
    table = np.asarray(neighbor_table(rows, 4, metric=metric, valid_V=valid, block=7))
    np.testing.assert_array_equal(table, _oracle(rows, 4, metric, valid))
    assert valid[table[:, 1:]].all() and not valid[table[:, 0]].all()


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_the_anchors_group_are_never_its_neighbours(metric):
    rows = np.repeat(_normal(20, 6), 2, axis=0) + 0.01 * _normal(40, 6, seed=1)  # each row has a near double
    group = np.repeat(np.arange(20), 2)
    valid = np.random.default_rng(2).random(40) < 0.8
    table = np.asarray(neighbor_table(rows, 4, metric=metric, valid_V=valid, group_V=group, block=7))
    for i in range(40):
        allowed = valid & (group != group[i])
        allowed[i] = True
        np.testing.assert_array_equal(table[i], _oracle(rows, 4, metric, allowed)[i])
    assert (table != np.asarray(neighbor_table(rows, 4, metric=metric, valid_V=valid))).any()
    alone = neighbor_table(rows, 4, metric=metric, valid_V=valid, group_V=np.arange(40))
    np.testing.assert_array_equal(alone, neighbor_table(rows, 4, metric=metric, valid_V=valid))


def test_k_may_be_the_number_of_valid_rows():
    rows = _normal(12, 4)
    valid = np.arange(12) < 3
    table = np.asarray(neighbor_table(rows, 3, valid_V=valid))
    np.testing.assert_array_equal(table, _oracle(rows, 3, "cosine", valid))


@pytest.mark.parametrize("metric", METRICS)
def test_identical_rows_lower_id_first_however_many(metric):
    rows = np.tile(_normal(3, 17), (15, 1))  # each row fifteen times: far more twins than wanted
    table = neighbor_table(rows, 5, metric=metric, block=16)
    twins = _oracle(rows, 5, metric)
    np.testing.assert_array_equal(table, twins)
    if metric != "dot":  # a longer row may have the larger product
        assert (np.asarray(table)[:, 1:] % 3 == np.asarray(table)[:, :1] % 3).all()


def _table_with_uneven_products(monkeypatch, error, rows, k, metric):
    """The table where the product adds an error [V] to its columns, as its tiles may by rounding."""
    scores = nb._block_scores
    monkeypatch.setattr(nb, "_block_scores", lambda *given: scores(*given) + error[None, :])
    build = jax.jit(nb._table.__wrapped__, static_argnames=("k", "metric", "block"))
    return build(jnp.asarray(rows), jnp.ones(len(rows), bool), k=k, metric=metric, block=16)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_twins_that_the_product_tells_apart_still_tie(metric, monkeypatch):
    rows = np.tile(_normal(3, 17), (15, 1))
    table = _table_with_uneven_products(monkeypatch, 1e-6 * np.arange(45), rows, 5, metric)
    np.testing.assert_array_equal(table, _oracle(rows, 5, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_is_that_of_the_rows_and_not_of_the_product(metric, monkeypatch):
    rows = _normal(7, 5)  # so few that all are nominated, in whatever order
    error = np.random.default_rng(6).normal(size=7)
    table = _table_with_uneven_products(monkeypatch, error, rows, 4, metric)
    np.testing.assert_array_equal(table, _oracle(rows, 4, metric))


@pytest.mark.parametrize("metric", ["cosine", "l1"])
def test_all_rows_identical(metric):
    table = neighbor_table(np.ones((20, 3), np.float32), 3, metric=metric)
    expected = [[i, *[j for j in (0, 1, 2) if j != i][:2]] for i in range(20)]
    np.testing.assert_array_equal(table, expected)


def test_ties_between_different_rows_go_to_the_lower_id():
    rows = np.array([[1, 0], [0, 1], [0, -1], [0, 2], [1, 1], [1, -1]], np.float32)
    for metric in ("dot", "l1"):
        table = neighbor_table(rows, 6, metric=metric)
        np.testing.assert_array_equal(table[0], _oracle(rows, 6, metric)[0], err_msg=metric)


def test_zero_rows_have_cosine_zero():
    rows = _normal(14, 3)
    rows[[2, 9]] = 0
    table = np.asarray(neighbor_table(rows, 14))
    np.testing.assert_array_equal(table, _oracle(rows, 14, "cosine"))
    np.testing.assert_array_equal(table[2, 1:], [i for i in range(14) if i != 2])


def test_cosine_ignores_length_however_extreme():
    rows = _normal(20, 6)
    lengths = np.float32(10.0) ** np.linspace(-30, 15, 20, dtype=np.float32)
    scaled = rows * lengths[:, None]
    np.testing.assert_array_equal(neighbor_table(scaled, 4), neighbor_table(rows, 4))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_any_float_dtype(dtype):
    rows = np.asarray(jnp.asarray(_normal(25, 6), jnp.bfloat16), np.float32)
    given = rows.astype(dtype) if dtype is np.float64 else jnp.asarray(rows, dtype)
    np.testing.assert_array_equal(
        neighbor_table(given, 4), _oracle(np.asarray(given, np.float32), 4, "cosine")
    )


def test_k_one_is_the_row_itself():
    np.testing.assert_array_equal(neighbor_table(_normal(7, 2), 1)[:, 0], np.arange(7))


@pytest.mark.parametrize("metric", ["cosine", "l1"])
def test_memory_grows_with_the_block_and_not_with_the_square(metric):
    size, width, block = 512, 40, 8
    rows = jnp.zeros((size, width))
    compiled = nb._table.lower(rows, jnp.ones(size, bool), 3, metric, block).compile()
    scratch = compiled.memory_analysis().temp_size_in_bytes
    assert scratch < 4 * (8 * size * width + 8 * size * block + 64 * size)
    assert scratch < 4 * size * size


def test_first_identical_finds_every_twin_and_no_other():
    rows = np.random.default_rng(5).choice(
        np.float32([-1, 1]), size=(400, 6)
    )  # 64 different rows, signs alone
    expected = [next(j for j in range(400) if (rows[j] == rows[i]).all()) for i in range(400)]
    np.testing.assert_array_equal(nb._first_identical(jnp.asarray(rows)), expected)


def test_sharded_embedding_gives_the_same_table():
    rows = _normal(64, 16)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    np.testing.assert_array_equal(neighbor_table(sharded, 3, block=16), neighbor_table(rows, 3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(k=3, metric="cos"), "metric 'cos'"),
        (dict(k=0), "k is 0"),
        (dict(k=6), "number of valid rows, 5"),
        (dict(k=3, valid_V=np.array([1, 1, 0, 0, 0], bool)), "number of valid rows, 2"),
        (dict(k=2, valid_V=np.ones(4, bool)), "valid_V"),
        (dict(k=2, group_V=np.ones(4, int)), "group_V must have shape"),
        (dict(k=4, group_V=np.array([1, 1, 1, 0, 2])), "leaves its rows only 2 valid rows of others"),
        (dict(k=2, embedding_VD=np.ones(4, np.float32)), "embedding_VD"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"embedding_VD": _normal(5, 2)} | arguments
    with pytest.raises(ValueError, match=message):
        neighbor_table(**arguments)
