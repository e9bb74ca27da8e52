"""Neighbours, clouds and planes against plain NumPy; Appendix E's metrics by hand."""

import numpy as np
import pytest

from ngrpo_jax.algo.neighbors import METRICS, neighbor_table
from ngrpo_jax.evaluation.statistics import geometry

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((60, 8)).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("group", [None, np.arange(60) // 3], ids=["any", "other spelling"])
def test_nearest_rows_are_those_of_the_table_that_rollouts_mix_by(metric, group):
    allowed = dict(valid_V=np.arange(60) % 7 != 0, group_V=group)
    table = np.asarray(neighbor_table(ROWS, 6, metric=metric, **allowed))
    ids, scores = geometry.nearest_rows(ROWS, [3, 7, 59], 5, metric=metric, **allowed)
    np.testing.assert_array_equal(ids, table[[3, 7, 59], 1:])
    nearest_first = np.diff(scores, axis=1) * (1 if metric in ("l1", "l2") else -1)
    assert (nearest_first >= 0).all()


def test_cosines_of_neighbours_and_refusals():
    ids, scores = geometry.nearest_rows(ROWS, [0], 1)
    a, b = ROWS[0], ROWS[ids[0, 0]]
    assert scores[0, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    with pytest.raises(ValueError, match="1 to 59"):
        geometry.nearest_rows(ROWS, [0], 60)
    with pytest.raises(ValueError, match="metric 'angle'"):
        geometry.nearest_rows(ROWS, [0], 1, metric="angle")


def test_appendix_e_by_hand():
    metrics = geometry.cosine_metrics(np.array([1.0, 0.9, 0.96, 0.94]))
    assert metrics == {"mean": pytest.approx(0.95), "min": 0.9, "below_095": 0.5}


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


def test_the_nearest_token_of_a_row_is_itself():
    ids, cosines = geometry.nearest_cosine(ROWS[[4, 9]] * 3, ROWS)
    assert list(ids) == [4, 9]
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)
