"""The maintained table against one built from nothing after every update; its bounds against float64."""

import jax
import numpy as np
import pytest

from ngrpo_jax.algo.neighbors import METRICS, neighbor_table
from ngrpo_jax.algo.neighbors import refresh as rf
from ngrpo_jax.algo.neighbors.eligibility import Eligible, eligible_rows

SIZE, WIDTH, K = 400, 12, 3


def _rows(seed=0, size=SIZE):
    """Clusters of unlike lengths, three identical rows, and a zero row that is not valid."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(40, WIDTH))
    rows = centres[random.integers(0, 40, size)] + 0.4 * random.normal(size=(size, WIDTH))
    rows *= np.exp(0.3 * random.normal(size=(size, 1)))
    rows[[7, 90, 201]] = rows[7]
    rows[31] = 0
    return rows.astype(np.float32)


def _valid(size=SIZE):
    return np.arange(size) % 9 != 4


def _eligible(spelled=False):
    """With `spelled`: every row is of a group with some of those that are like it."""
    return Eligible(_valid(), _groups() if spelled else None)


def _groups():
    """Half of each cluster of `_rows` is one group, the other half another."""
    random = np.random.default_rng(0)
    random.normal(size=(40, WIDTH))
    return (2 * random.integers(0, 40, SIZE) + np.arange(SIZE) % 2).astype(np.int32)


def _build(rows, eligible, config):
    return rf.refresh(rf.empty_state(len(rows), config), rows, eligible, config)[0]


def _closeness(rows, metric):
    rows = np.asarray(rows, np.float64)
    if metric == "cosine":
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.where(norms > 0, norms, 1)
    if metric in ("cosine", "dot"):
        return rows @ rows.T
    differences = np.abs(rows[:, None] - rows[None])
    return -differences.sum(-1) if metric == "l1" else -np.sqrt((differences**2).sum(-1))


def _assert_exact(table, rows, eligible, metric):
    """Each entry's closeness is that of the float64 oracle at its place, within rounding."""
    closeness = _closeness(rows, metric)
    table, allowed = np.asarray(table), np.asarray(eligible.pairs(np.arange(len(rows))))
    assert (table[:, 0] == np.arange(len(rows))).all()
    assert np.take_along_axis(allowed, table[:, 1:], 1).all()
    found = np.take_along_axis(closeness, table[:, 1:], 1)
    closeness[~allowed] = -np.inf
    np.testing.assert_allclose(found, -np.sort(-closeness, 1)[:, : K - 1], atol=2e-5, rtol=2e-6)


def _walk(metric, step, updates=12, mesh=None, tile=48, eligible=None):
    """Follows a random walk: yields (state, stats, rows) after every refresh."""
    config = rf.TableConfig(K, metric, mesh, tile=tile)
    random, rows, eligible = np.random.default_rng(1), _rows(), eligible or _eligible()
    state = _build(rows, eligible, config)
    for _ in range(updates):
        moved = rows + np.float32(step) * random.normal(size=rows.shape).astype(np.float32)
        state = rf.add_drift(state, rows, moved, eligible, config)
        rows = moved
        state, stats = rf.refresh(state, rows, eligible, config)
        yield state, stats, rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("step, spelled", [(1e-5, False), (1e-3, False), (3e-2, False), (1e-3, True)])
def test_the_maintained_table_is_a_fresh_one_after_every_update(metric, step, spelled):
    config, eligible = rf.TableConfig(K, metric), _eligible(spelled)
    for state, _, rows in _walk(metric, step, eligible=eligible):
        _assert_exact(rf.table(state, config), rows, eligible, metric)


def test_groups_matter_to_these_rows():
    """Without them, many rows have other neighbours."""
    config = rf.TableConfig(K)
    apart, whole = (
        np.asarray(rf.table(_build(_rows(), _eligible(spelled), config), config)) for spelled in (True, False)
    )
    assert (apart[:, 1] != whole[:, 1]).mean() > 0.2


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spelled", [False, True])
def test_small_steps_cost_little_and_large_ones_a_full_build(metric, spelled):
    """With groups too: bounds over rows that are not eligible would fail wherever such a one is near."""
    eligible = _eligible(spelled)
    all_stats = [stats for _, stats, _ in _walk(metric, 1e-6, eligible=eligible)]
    config = rf.TableConfig(K, metric, tile=48)
    assert np.median([rf.cost(e, SIZE, config) for e in all_stats]) < 0.2
    assert np.median([int(e.rescored) for e in all_stats]) < SIZE / 10
    assert np.median([int(e.searched) for e in all_stats]) < SIZE / 20
    assert not any(bool(e.full) for e in all_stats)
    large = [stats for _, stats, _ in _walk(metric, 1.0, updates=3, eligible=eligible)]
    assert all(bool(e.full) and rf.cost(e, SIZE, config) >= 1 for e in large)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spelled", [False, True])
def test_every_bound_holds(metric, spelled):
    """No closeness outside the candidates is above outside + moved; none has changed by more than moved."""
    config = rf.TableConfig(K, metric, spare=3, tile=48)
    random, rows, valid, eligible = np.random.default_rng(4), _rows(), _valid(), _eligible(spelled)
    allowed = np.asarray(eligible.pairs(np.arange(SIZE)))
    state = _build(rows, eligible, config)
    start = _closeness(rows, metric)
    for _ in range(6):
        steps = 10.0 ** random.uniform(-6, -2, size=(SIZE, 1))
        moved = (rows + steps * random.normal(size=rows.shape)).astype(np.float32)
        state, rows = rf.add_drift(state, rows, moved, eligible, config), moved
        now, kept = _closeness(rows, metric), jax.tree.map(np.asarray, state.bounds)
        change = np.abs(now - start)[:, valid].max(1)
        assert (change <= kept.drift_V).all()
        assert np.median(kept.drift_V) <= 30 * np.median(change)  # a bound that says something
        for i in range(SIZE):
            others = np.setdiff1d(np.flatnonzero(allowed[i]), kept.ids_VC[i])
            assert now[i, others].max() <= kept.rest_bound_V[i] + kept.drift_V[i]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_a_row_that_grows_out_of_nowhere_is_found(metric):
    """A zero row, which turns farther than any other can, comes next to one that did not know it."""
    config, eligible, rows = rf.TableConfig(K, metric), _eligible(), _rows()
    rows[33] = 0
    state = _build(rows, eligible, config)
    moved = rows.copy()
    moved[33] = 3 * rows[100]
    state = rf.add_drift(state, rows, moved, eligible, config)
    state, stats = rf.refresh(state, moved, eligible, config)
    _assert_exact(rf.table(state, config), moved, eligible, metric)
    assert 33 in np.asarray(rf.table(state, config))[100] and int(stats.searched) > 0


@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("spare", [1, 3])
def test_a_gap_that_two_steps_close_is_seen(metric, spare):
    """On a line: the neighbours of row 0 at 1 and 1.1 change places, 0.026 a step each; the rest is far."""
    config = rf.TableConfig(2, metric, spare=spare)
    rows = np.array([[0.0], [1.0], [1.1], [30.0], [40.0], [60.0]], np.float32)
    eligible = eligible_rows(6, 2)
    state = _build(rows, eligible, config)
    assert rf.table(state, config)[0, 1] == 1
    step = np.array([[0], [0.026], [-0.026], [0], [0], [0]], np.float32)
    for nearest in (1, 2):
        state = rf.add_drift(state, rows, rows + step, eligible, config)
        rows = rows + step
        state, stats = rf.refresh(state, rows, eligible, config)
        assert rf.table(state, config)[0, 1] == nearest
        assert (int(stats.rescored) > 0) == (nearest == 2)  # the first step is less than half of the gap


def test_a_matrix_that_was_not_followed_is_built_anew():
    config, eligible = rf.TableConfig(K), _eligible()
    state = _build(_rows(), eligible, config)
    other = _rows(seed=5)
    new, stats = rf.refresh(state, other, eligible, config)
    assert bool(stats.full) and rf.cost(stats, SIZE, config) == 1.0
    _assert_exact(rf.table(new, config), other, eligible, "cosine")
    later = other + np.float32(1e-6)
    gap = rf.add_drift(state, other, later, eligible, config)  # started from another matrix
    assert np.isinf(np.asarray(gap.bounds.drift_V)).all()
    found, stats = rf.refresh(gap, later, eligible, config)
    assert bool(stats.full)
    _assert_exact(rf.table(found, config), later, eligible, "cosine")


def test_nothing_is_done_where_nothing_moved():
    config, eligible, rows = rf.TableConfig(K), _eligible(), _rows()
    state = rf.add_drift(_build(rows, eligible, config), rows, rows, eligible, config)
    again, stats = rf.refresh(state, rows, eligible, config)
    np.testing.assert_array_equal(again.bounds.ids_VC, state.bounds.ids_VC)
    assert int(stats.rescored) < 20 and int(stats.searched) <= int(stats.rescored)


@pytest.mark.parametrize("metric", ["cosine", "l1"])
def test_a_mesh_follows_to_the_same_table(metric):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config, eligible = rf.TableConfig(K, metric), _eligible(spelled=True)
    alone = _walk(metric, 1e-3, updates=3, eligible=eligible)
    split = _walk(metric, 1e-3, updates=3, mesh=mesh, tile=16, eligible=eligible)
    for (a, work_a, rows), (b, work_b, _) in zip(alone, split, strict=True):
        np.testing.assert_array_equal(rf.table(a, config), rf.table(b, config))
        _assert_exact(rf.table(b, config), rows, eligible, metric)
        assert abs(int(work_a.rescored) - int(work_b.rescored)) < SIZE / 4


def test_any_sharding_has_the_same_mark():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = _rows()
    marks = {int(jax.jit(rf._fingerprint)(rows))}
    for spec in (("x",), (), (None,)):
        placed = jax.device_put(rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        marks.add(int(jax.jit(rf._fingerprint)(placed)))
    swapped = rows.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    assert len(marks) == 1 and int(jax.jit(rf._fingerprint)(swapped)) not in marks


def test_an_empty_state_has_the_shapes_of_a_full_one():
    for k, size in ((3, SIZE), (1, 30), (3, 8)):
        config = rf.TableConfig(k)
        state = _build(_rows(size=SIZE)[:size], eligible_rows(size, k), config)
        described, empty = (
            jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, rf.empty_state(size, config))
        )
        assert described == empty
        np.testing.assert_array_equal(rf.table(state, config), neighbor_table(_rows()[:size], k))


def test_fewer_valid_rows_than_candidates():
    config, eligible, rows = rf.TableConfig(K), eligible_rows(SIZE, K, np.arange(SIZE) < 4), _rows()
    state = _build(rows, eligible, config)
    for _ in range(3):
        moved = rows + np.float32(1e-2) * _rows(seed=8)
        state = rf.add_drift(state, rows, moved, eligible, config)
        rows = moved
        state, _ = rf.refresh(state, rows, eligible, config)
        _assert_exact(rf.table(state, config), rows, eligible, "cosine")
