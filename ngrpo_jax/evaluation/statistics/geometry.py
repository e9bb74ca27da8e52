"""Where mixed and noisy inputs lie among the embedding rows: Appendix E, Figure 1, and lists of neighbours.

Owns this geometry, in NumPy and for a few tokens at a time. Must not know tokenizers, models or files. The
neighbour table of rollouts is made by `algo.neighbors`; here the nearest rows of a few tokens are computed
directly.

A is anchors, X points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEAR = 0.95  # Appendix E counts the inputs whose cosine to their anchor is below this


def cosine_metrics(cosines: np.ndarray) -> dict[str, float]:
    """Appendix E: mean, min and the share below 0.95 of mixed inputs' cosines to their anchors [X]."""
    cosines = np.asarray(cosines)
    return {
        "mean": float(cosines.mean()),
        "min": float(cosines.min()),
        "below_095": float((cosines < NEAR).mean()),
    }


def nearest_rows(
    embedding_VD: np.ndarray,
    anchors: Sequence[int],
    count: int,
    *,
    metric: str = "cosine",
    valid_V: np.ndarray | None = None,
    group_V: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` other rows nearest to each anchor, nearest first; of equally near rows the lower id first.

    Args:
      metric: "cosine", "dot", "l2" or "l1".
      valid_V: which rows may be neighbours; default all.
      group_V: rows with equal entries are no neighbours of one another; default all entries differ.

    Returns:
      (ids [A, count], nearness [A, count]): the cosine, dot product or distance.

    Raises:
      ValueError: count above the number of other valid rows, or an unknown metric.
    """
    rows_VD = np.asarray(embedding_VD, np.float32)
    valid_V = np.ones(len(rows_VD), bool) if valid_V is None else np.asarray(valid_V, bool)
    group_V = np.arange(len(rows_VD)) if group_V is None else np.asarray(group_V)
    ids_AC, found_AC = [], []
    for anchor in anchors:
        allowed_V = valid_V & (group_V != group_V[anchor])
        most = int(allowed_V.sum())
        if not 1 <= count <= most:
            raise ValueError(
                f"token {anchor} can have 1 to {most} neighbours in this vocabulary, not {count}"
            )
        nearness_V = np.where(allowed_V, _nearness(rows_VD, rows_VD[anchor], metric), -np.inf)
        best = np.argsort(-nearness_V, kind="stable")[:count]
        ids_AC.append(best)
        found_AC.append(nearness_V[best] if metric in ("cosine", "dot") else -nearness_V[best])
    return np.array(ids_AC), np.array(found_AC)


def _nearness(rows_VD: np.ndarray, row_D: np.ndarray, metric: str) -> np.ndarray:
    """Larger is nearer, float [V]; a zero row has cosine 0 to every row."""
    if metric == "cosine":
        norms_V = np.linalg.norm(rows_VD, axis=1) * np.linalg.norm(row_D)
        return rows_VD @ row_D / np.where(norms_V > 0, norms_V, 1.0)
    if metric == "dot":
        return rows_VD @ row_D
    if metric == "l2":
        return -np.linalg.norm(rows_VD - row_D, axis=1)
    if metric == "l1":
        return -np.abs(rows_VD - row_D).sum(axis=1)
    raise ValueError(f"metric {metric!r} is unknown: use cosine, dot, l2 or l1")


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


def nearest_cosine(points_XD: np.ndarray, rows_VD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids [X], cosines [X]): the row nearest to each point by cosine."""
    units_XD = points_XD / np.linalg.norm(points_XD, axis=1, keepdims=True)
    norms_V = np.linalg.norm(rows_VD, axis=1)
    cosines_XV = units_XD @ (rows_VD / np.where(norms_V > 0, norms_V, 1.0)[:, None]).T
    ids_X = cosines_XV.argmax(axis=1)
    return ids_X, cosines_XV[np.arange(len(ids_X)), ids_X]
