"""Cosines of mixed inputs to their anchors, of recorded responses (Appendix E of arXiv 2606.10768).

Owns the computation of cosines from trajectories. Must not know how they are summarised or stored.
I is mixed inputs: a sequence's number and a position in its response.
"""

import jax
import numpy as np

from ngrpo_jax.algo.mixture import Mixture, cosine_to_anchor
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.setup.policy import Policy

COSINE_SAMPLE = 4096  # inputs of one call: a fixed shape, so that the program compiles once

_cosine_to_anchor = jax.jit(cosine_to_anchor)


def mixed_cosines(policy: Policy, trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """(positions int [I, 2], cosines float32 [I]) of every mixed input, in order of sequence and position."""
    positions = np.argwhere(trajectories.mixed_BT)
    chunks = [positions[start : start + COSINE_SAMPLE] for start in range(0, len(positions), COSINE_SAMPLE)]
    found = [cosines_at(policy, trajectories, chunk) for chunk in chunks]
    return positions, np.concatenate([np.zeros(0, np.float32), *found])


def cosines_at(policy: Policy, trajectories: Trajectories, positions_I2: np.ndarray) -> np.ndarray:
    """Cosine to its anchor of each input at these (sequence, position), float32 [I ≤ COSINE_SAMPLE]."""
    count = len(positions_I2)
    padded = np.concatenate([positions_I2, np.repeat(positions_I2[-1:], COSINE_SAMPLE - count, axis=0)])
    mixture = mixtures_at(trajectories, padded)
    return np.asarray(_cosine_to_anchor(policy.params["embed"]["embedding"], mixture))[:count]


def mixtures_at(trajectories: Trajectories, positions_I2: np.ndarray) -> Mixture:
    """The recorded mixtures at these (sequence, position): leaves [I, ...]."""
    sequences_I, times_I = positions_I2.T
    return jax.tree.map(lambda leaf: leaf[sequences_I, times_I], trajectories.mixtures)
