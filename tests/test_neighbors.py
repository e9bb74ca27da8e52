"""The neighbour table against a float64 scan over all pairs; ties, identical rows, masks, zero rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo.neighbors import METRICS, TableConfig, nearness, neighbor_table, search, tiles
from ngrpo_jax.algo.neighbors import exact as nb
from ngrpo_jax.algo.neighbors.eligibility import Eligible, eligible_rows


def _scores(rows, metric):
    rows = np.asarray(rows, np.float64)
    if metric == "cosine":
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.where(norms > 0, norms, 1)
    if metric in ("cosine", "dot"):
        return (rows[:, None, :] * rows[None, :, :]).sum(
            -1
        )  # a matrix product may round equal rows differently
    differences = rows[:, None, :] - rows[None, :, :]
    return -(np.abs(differences) if metric == "l1" else differences**2).sum(-1)


def _oracle(rows, k, metric, valid=None, group=None):
    """Sort every pair by (score, lower id); bit-identical rows have bit-identical scores here."""
    scores = _scores(rows, metric)
    valid = np.ones(len(rows), bool) if valid is None else valid
    group = np.arange(len(rows)) if group is None else group
    table = np.empty((len(rows), k), np.int32)
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if group[j] != group[i] and valid[j]]
        table[i] = [i, *sorted(others, key=lambda j: (-scores[i, j], j))[: k - 1]]
    return table


def _normal(size, width, seed=0):
    return np.random.default_rng(seed).normal(size=(size, width)).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "size, width, k, tile", [(37, 19, 4, 64), (9, 5, 9, 50), (200, 19, 4, 48), (333, 7, 6, 64)]
)
def test_neighbor_table_eq7_eq8(metric, size, width, k, tile):
    """Searched row by row, and by tiles: five blocks, and six of which the longest step meets itself."""
    rows = _normal(size, width)
    table = neighbor_table(rows, k, metric=metric, tile=tile)
    assert table.shape == (size, k) and table.dtype == jnp.int32
    np.testing.assert_array_equal(table, _oracle(rows, k, metric))


@pytest.mark.parametrize("tile", [36, 40, 44, 52, 60, 72, 1000])
def test_tile_size_changes_nothing(tile):
    rows = _normal(300, 8)
    np.testing.assert_array_equal(neighbor_table(rows, 4, tile=tile), _oracle(rows, 4, "cosine"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size, tile", [(30, 64), (250, 48)])
def test_rows_not_valid_are_never_neighbours_but_have_some(metric, size, tile):
    rows = _normal(size, 4)
    valid = np.random.default_rng(1).random(size) < 0.4
    table = np.asarray(neighbor_table(rows, 4, metric=metric, valid_V=valid, tile=tile))
    np.testing.assert_array_equal(table, _oracle(rows, 4, metric, valid))
    assert valid[table[:, 1:]].all() and not valid[table[:, 0]].all()


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_that_share_one_memory_are_found_all_the_same(metric):
    """The nearest rows have the same number modulo the memories of a row, which keep one of them."""
    size, tile = 400, 80
    centres = 5 * _normal(tile // 4, 12)
    rows = centres[np.arange(size) % (tile // 4)] + 0.1 * _normal(size, 12, seed=1)
    np.testing.assert_array_equal(neighbor_table(rows, 3, metric=metric, tile=tile), _oracle(rows, 3, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size, tile, on_mesh", [(40, 64, False), (300, 48, False), (300, 32, True)])
def test_rows_of_the_anchors_group_are_never_its_neighbours(metric, size, tile, on_mesh):
    """Each row has near doubles, far apart in the matrix and next to it, that are of its group."""
    rows = np.tile(np.repeat(_normal(size // 4, 6), 2, axis=0), (2, 1)) + 0.01 * _normal(size, 6, seed=1)
    group = np.tile(np.repeat(np.arange(size // 4) * 7 - 3, 2), 2)
    valid = np.random.default_rng(2).random(size) < 0.8
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)) if on_mesh else None
    options = dict(metric=metric, valid_V=valid, tile=tile, mesh=mesh)
    table = np.asarray(neighbor_table(rows, 4, group_V=group, **options))
    np.testing.assert_array_equal(table, _oracle(rows, 4, metric, valid, group))
    assert (table != np.asarray(neighbor_table(rows, 4, **options))).any()
    alone = neighbor_table(rows, 4, group_V=np.arange(size), **options)
    np.testing.assert_array_equal(alone, neighbor_table(rows, 4, **options))


def test_k_may_be_the_number_of_valid_rows():
    rows = _normal(12, 4)
    valid = np.arange(12) < 3
    table = np.asarray(neighbor_table(rows, 3, valid_V=valid))
    np.testing.assert_array_equal(table, _oracle(rows, 3, "cosine", valid))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tile", [16, 48])
def test_identical_rows_lower_id_first_however_many(metric, tile):
    rows = np.tile(_normal(13, 17), (15, 1))  # each row fifteen times: far more identical rows than wanted
    table = neighbor_table(rows, 5, metric=metric, tile=tile)
    expected = _oracle(rows, 5, metric)
    np.testing.assert_array_equal(table, expected)
    if metric != "dot":  # a longer row may have the larger product
        assert (np.asarray(table)[:, 1:] % 13 == np.asarray(table)[:, :1] % 13).all()


def _table_with_uneven_products(monkeypatch, error, rows, k, metric):
    """The table where the product adds an error [V] to its columns, as its tiles may by rounding."""
    scores = nearness.tile_scores
    monkeypatch.setattr(nearness, "tile_scores", lambda *given: scores(*given) + error[None, :])
    config = TableConfig(k, metric, spare=4, tile=64)
    return nb.as_table(nb.nearest(jnp.asarray(rows), eligible_rows(len(rows), k), config).ids_AC, k)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_identical_rows_to_which_the_product_gives_unequal_scores_still_tie(metric, monkeypatch):
    rows = np.tile(_normal(3, 17), (15, 1))
    table = _table_with_uneven_products(monkeypatch, 1e-6 * np.arange(45), rows, 5, metric)
    np.testing.assert_array_equal(table, _oracle(rows, 5, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_is_that_of_the_rows_and_not_of_the_product(metric, monkeypatch):
    rows = _normal(7, 5)  # so few that all are candidates, in whatever order
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
def test_memory_grows_with_the_tile_and_not_with_the_square(metric):
    size, width, tile = 4096, 40, 128
    build = nb.compiled(nb.nearest, TableConfig(3, metric, spare=4, tile=tile))
    compiled = build.lower(jnp.zeros((size, width)), eligible_rows(size, 3)).compile()
    scratch = compiled.memory_analysis().temp_size_in_bytes
    assert scratch < 4 * (8 * size * width + 4 * size * tile + 16 * tile * tile)
    assert scratch < 4 * size * size / 4


@pytest.mark.parametrize("tile, memories, size", [(48, 12, 200), (64, 16, 384)])
@pytest.mark.parametrize("groups", [None, 30])
def test_the_bound_on_the_rest_holds_for_every_row(tile, memories, size, groups):
    """No other row's score is above the bound; candidates are distinct, eligible and not the row itself."""
    rows, valid = _normal(size, 6), np.random.default_rng(2).random(size) < 0.8
    group = np.arange(size) % (groups or size)
    eligible = Eligible(jnp.asarray(valid), None if groups is None else jnp.asarray(group))
    tiling = tiles.make_tiling(size, tile, 1)
    assert tiling.memories == memories
    index = search.make_index(jnp.asarray(rows), eligible, "dot")
    lists = tiles.find_candidates(index, tiling, 5, jnp.int32(0), tiling.blocks)
    found = jax.tree.map(np.asarray, tiles.merge(list(lists), tiling))
    scores = rows @ rows.T
    for i in range(size):
        ids = found.ids_AC[i]
        assert len(set(ids)) == 5 and valid[ids].all() and (group[ids] != group[i]).all()
        allowed = valid & (group != group[i])
        rest = np.setdiff1d(np.flatnonzero(allowed), ids)
        assert scores[i, rest].max() <= found.rest_bound_A[i] + 1e-5
        assert found.rest_bound_A[i] <= scores[i, allowed].max() + 1e-3


def test_the_largest_scores_among_many_columns_of_equals_the_lower_column():
    scores = np.random.default_rng(3).integers(0, 40, size=(5, 1900)).astype(np.float32)
    top, columns = search.largest(jnp.asarray(scores), 9)
    expected = [sorted(range(1900), key=lambda j: (-row[j], j))[:9] for row in scores]
    np.testing.assert_array_equal(columns, expected)
    np.testing.assert_array_equal(top, np.take_along_axis(scores, np.array(expected), 1))


def test_first_identical_finds_all_identical_rows_and_no_other():
    rows = np.random.default_rng(5).choice(
        np.float32([-1, 1]), size=(400, 6)
    )  # 64 different rows, signs alone
    expected = [next(j for j in range(400) if (rows[j] == rows[i]).all()) for i in range(400)]
    np.testing.assert_array_equal(nearness.first_identical(jnp.asarray(rows)), expected)


@pytest.mark.parametrize("metric", ["cosine", "l1"])
@pytest.mark.parametrize("size, tile", [(64, 64), (500, 48), (520, 16)])
@pytest.mark.parametrize("spec", [("x",), (None, ("x", "y")), (("y", "x"),)])
def test_a_mesh_gives_the_same_table_from_any_sharding(metric, size, tile, spec):
    rows, valid = np.tile(_normal(size // 2, 16), (2, 1)), np.arange(size) % 7 != 3
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    if size % 8 and spec == (("y", "x"),):
        spec = ()
    sharded = jax.device_put(rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    table = neighbor_table(sharded, 3, metric=metric, valid_V=valid, tile=tile, mesh=mesh)
    np.testing.assert_array_equal(table, _oracle(rows, 3, metric, valid))
    assert table.sharding.is_fully_replicated


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
