"""Neighbours, clouds and planes against plain NumPy."""

import numpy as np
import pytest

from ngrpo_jax.algo.neighbors import METRICS, neighbor_table
from ngrpo_jax.algo.neighbors.eligibility import eligible_rows
from ngrpo_jax.errors import UserError
from ngrpo_jax.evaluation.statistics import geometry

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((60, 8)).astype(np.float32)


NEARNESS = {
    "cosine": lambda a, b: b @ a / np.linalg.norm(b, axis=1) / np.linalg.norm(a),
    "dot": lambda a, b: b @ a,
    "l2": lambda a, b: np.linalg.norm(b - a, axis=1),
    "l1": lambda a, b: np.abs(b - a).sum(axis=1),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("group", [None, np.arange(60) // 3], ids=["any", "other spelling"])
def test_nearest_rows_are_those_of_plain_numpy_and_of_the_table_that_rollouts_mix_by(metric, group):
    valid = np.arange(60) % 7 != 0
    eligible, anchors = eligible_rows(60, 6, valid, group), [3, 7, 59]
    ids, found = geometry.nearest_rows(ROWS, anchors, 5, metric=metric, eligible=eligible)
    table = np.asarray(neighbor_table(ROWS, 6, metric=metric, valid_V=valid, group_V=group))
    np.testing.assert_array_equal(ids, table[anchors, 1:])
    sign = 1 if metric in ("l1", "l2") else -1
    groups = np.arange(60) if group is None else group
    for row, anchor in enumerate(anchors):
        every = NEARNESS[metric](ROWS[anchor], ROWS)
        allowed = np.flatnonzero(valid & (groups != groups[anchor]))
        nearest = allowed[np.argsort(sign * every[allowed])[:5]]
        np.testing.assert_array_equal(ids[row], nearest)
        np.testing.assert_allclose(found[row], every[nearest], rtol=1e-5)


@pytest.mark.parametrize("count", [0, 60])
def test_more_neighbours_than_there_are_is_refused(count):
    with pytest.raises(UserError, match=f"1 to 59 neighbours in this vocabulary, not {count}"):
        geometry.nearest_rows(ROWS, [0], count, metric="cosine", eligible=eligible_rows(60, 1))


def test_noise_has_the_deviation_of_stht():
    points = geometry.noisy_points(ROWS[0], 0.33, 20_000, np.random.default_rng(1))
    rms = np.sqrt(np.mean(ROWS[0] ** 2))
    np.testing.assert_allclose(points.std(axis=0), 0.33 * rms, rtol=0.03)
    np.testing.assert_allclose(points.mean(axis=0), ROWS[0], atol=0.01)


def test_mixtures_are_convex_and_lean_to_their_anchor():
    corners = np.eye(3)  # the coordinates of a point are then its weights
    weights = geometry.mixed_points(corners, 500, np.random.default_rng(1))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert (weights >= 0).all() and (weights.argmax(axis=1) == 0).all()
    assert weights[:, 0].min() < 0.4 and weights[:, 0].max() > 0.9
    assert abs(weights[:, 1].mean() - weights[:, 2].mean()) < 0.03


def test_the_plane_is_that_of_the_covariances_largest_eigenvectors():
    points = RANDOM.standard_normal((300, 5)) * [5, 0.1, 3, 0.2, 0.3] + 7
    plane = geometry.principal_plane(points)
    values, vectors = np.linalg.eigh(np.cov(points.T))
    np.testing.assert_allclose(np.abs(plane.axes_2D @ vectors[:, [-1, -2]]), np.eye(2), atol=1e-6)
    np.testing.assert_allclose(plane.explained, values[[-1, -2]] / values.sum(), rtol=1e-6)
    np.testing.assert_allclose(plane(points).mean(axis=0), 0, atol=1e-9)
    again = geometry.principal_plane(points[::-1])
    np.testing.assert_allclose(again.axes_2D, plane.axes_2D, atol=1e-9)
    with pytest.raises(ValueError, match="2 points"):
        geometry.principal_plane(points[:2])


def test_cosines_are_those_of_plain_numpy_and_0_to_a_zero_row():
    rows = np.concatenate([ROWS, np.zeros((1, 8), np.float32)])
    found = geometry.pairwise_cosines(ROWS[[4, 9]] * 3.0, rows)
    np.testing.assert_allclose(found[0, :-1], NEARNESS["cosine"](ROWS[4], ROWS), atol=1e-6)
    assert list(found.argmax(axis=1)) == [4, 9] and (found[:, -1] == 0).all()
