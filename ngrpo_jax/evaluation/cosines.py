"""Cosines of mixed inputs to their anchors (Appendix E of arXiv 2606.10768), of recorded responses."""

from __future__ import annotations

import jax
import numpy as np

from ngrpo_jax.algo.mixture import Mixture, cosine_to_anchor
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.setup.policy import Policy

COSINE_SAMPLE = 4096  # mixed inputs whose cosine to their anchor is taken; a fixed shape compiles once


_cosine_to_anchor = jax.jit(cosine_to_anchor)


def mixed_cosines(policy: Policy, trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """(places [M, 2], cosines [M]): each mixed input's sequence and position, and how near to its anchor."""
    places = np.argwhere(trajectories.mixed_BT)
    parts = [places[start : start + COSINE_SAMPLE] for start in range(0, len(places), COSINE_SAMPLE)]
    found = [_padded_cosines(policy, trajectories, part) for part in parts]
    return places, np.concatenate([np.zeros(0, np.float32), *found])


def _padded_cosines(policy: Policy, trajectories: Trajectories, places_N2: np.ndarray) -> np.ndarray:
    """Cosine of the inputs at these (sequence, position) to their anchors, float32 [N ≤ COSINE_SAMPLE]."""
    count = len(places_N2)
    padded = np.concatenate([places_N2, np.repeat(places_N2[-1:], COSINE_SAMPLE - count, axis=0)])
    mixture = _at(trajectories.mixtures, padded)
    return np.asarray(_cosine_to_anchor(policy.params["embed"]["embedding"], mixture))[:count]


def _at(mixtures: Mixture, places_N2: np.ndarray) -> Mixture:
    rows_N, times_N = places_N2.T
    return jax.tree.map(lambda leaf: leaf[rows_N, times_N], mixtures)
