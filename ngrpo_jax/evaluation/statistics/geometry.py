"""Where mixed and noisy inputs lie among the embedding rows, for Figure 1, and lists of neighbours.

Owns this geometry, for a few tokens at a time: their nearest rows are searched with the functions of
`algo.neighbors`, without a table of all rows. Must not know tokenizers, models or files.

A is anchors, X points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.neighbors import nearness, search
from ngrpo_jax.algo.neighbors.eligibility import Eligible
from ngrpo_jax.algo.neighbors.exact import SPARE
from ngrpo_jax.errors import require


def nearest_rows(
    embedding_VD: np.ndarray, anchors: Sequence[int], count: int, *, metric: str, eligible: Eligible
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` rows nearest to each anchor: those of the neighbour table, without a search for all rows.

    Args:
      metric: one of `algo.neighbors.METRICS`.
      eligible: which rows may be neighbours of which.

    Returns:
      (ids [A, count], nearness [A, count]), nearest first: the cosine, dot product or distance.

    Raises:
      UserError: count below 1, or above the number of rows that may be neighbours of an anchor.
    """
    ids_A = jnp.asarray(anchors)
    most = int(eligible.pairs(ids_A).sum(axis=1).min())
    require(1 <= count <= most, f"a token can have 1 to {most} neighbours in this vocabulary, not {count}.")
    index = search.make_index(jnp.asarray(embedding_VD), eligible, metric)
    found = search.brute_force(index, ids_A, min(count + SPARE, index.size))
    scores_AC = np.asarray(found.scores_AC[:, :count])
    if metric == "l2":  # scores are larger for nearer rows, and those of l2 are squares
        scores_AC = -np.sqrt(-scores_AC)
    return np.asarray(found.ids_AC[:, :count]), -scores_AC if metric in ("l1", "l2") else scores_AC


def noisy_points(row_D: np.ndarray, sigma: float, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` samples of a row plus Gaussian noise of `sigma` times its root mean square, as STHT: [X, D]."""
    rms = np.sqrt(np.mean(np.square(row_D)))
    return row_D + sigma * rms * random.standard_normal((count, len(row_D)))


def mixed_points(rows_CD: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` mixtures of an anchor and its neighbours (`rows_CD`, anchor first): [X, D].

    Weights are uniform over those that (9) can give: positive, of sum 1, the anchor's the largest.
    """
    weights_XC = random.dirichlet(np.ones(len(rows_CD)), size=count)
    largest_X = weights_XC.argmax(axis=1)
    each_X = np.arange(count)
    weights_XC[each_X, largest_X], weights_XC[:, 0] = weights_XC[:, 0].copy(), weights_XC.max(axis=1)
    return weights_XC @ rows_CD


class Projection(NamedTuple):
    """A plane through points: `mean_D`, two orthonormal `axes_2D`, the share of all variance along each."""

    mean_D: np.ndarray
    axes_2D: np.ndarray
    explained: tuple[float, float]

    def __call__(self, points_XD: np.ndarray) -> np.ndarray:
        """Coordinates of points in the plane: [X, 2]."""
        return (points_XD - self.mean_D) @ self.axes_2D.T


def principal_plane(points_XD: np.ndarray) -> Projection:
    """The plane of largest variance: PCA by singular values.

    The largest entry of each axis is positive, so that the same points give the same picture.

    Raises:
      ValueError: fewer than three points.
    """
    points_XD = np.asarray(points_XD, np.float64)
    if len(points_XD) < 3:
        raise ValueError(f"a plane through {len(points_XD)} points is not determined; give three or more")
    mean_D = points_XD.mean(axis=0)
    _, singular, axes = np.linalg.svd(points_XD - mean_D, full_matrices=False)
    axes_2D = axes[:2]
    largest = np.take_along_axis(axes_2D, np.abs(axes_2D).argmax(axis=1)[:, None], axis=1)
    axes_2D = axes_2D * np.where(largest < 0, -1.0, 1.0)
    shares = np.square(singular) / max(float(np.square(singular).sum()), np.finfo(float).tiny)
    return Projection(mean_D, axes_2D, (float(shares[0]), float(shares[1])))


def pairwise_cosines(points_XD: np.ndarray, rows_VD: np.ndarray) -> np.ndarray:
    """The cosine of each point to each row, float32 [X, V]; 0 where either is zero."""
    points, rows = (nearness.comparable_rows(jnp.asarray(x), "cosine") for x in (points_XD, rows_VD))
    return np.asarray(nearness.tile_scores(points, rows, "cosine"))
