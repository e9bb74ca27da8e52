"""Rewards -> credit: the advantage of each response, and which responses take part in the update (NumPy).

Owns what the settings do to rewards between grading and packing: penalties for length, responses and groups
that are left out, the figures of both. Must not know how rewards were graded, nor how rows are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ngrpo_jax.algo.objectives import group_advantages, overlong_penalty, varied_groups
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings


class Credit(NamedTuple):
    """P groups of G responses, in the order of their trajectories.

    Attributes:
      advantages_PG: float32.
      counted_PG: bool, the responses that take part in the update; the others get weight 0, KL included. They
        still count in the mean and deviation of their group.
      figures: for the step's metrics.
    """

    advantages_PG: np.ndarray
    counted_PG: np.ndarray
    figures: dict[str, float]


def assign(
    rewards_PG: np.ndarray, trajectories: Trajectories, objective: ObjectiveSettings, limit: int
) -> Credit:
    """(12), after what `objective` does to responses that are too long and to groups of equal rewards.

    `limit`: tokens at which a response is cut off. Groups are judged by their rewards less any penalty.
    """
    figures: dict[str, float] = {}
    counted_PG = np.ones(rewards_PG.shape, bool)
    if objective.overlong == "penalize":
        penalty_B = overlong_penalty(
            trajectories.lengths_B,
            trajectories.stopped_B,
            limit=limit,
            interval=objective.overlong_interval,
            size=objective.overlong_penalty,
        )
        rewards_PG = rewards_PG - penalty_B.reshape(rewards_PG.shape)
        figures["reward/overlong_penalty"] = float(penalty_B.mean())
    if objective.overlong == "mask":
        counted_PG &= trajectories.stopped_B.reshape(rewards_PG.shape)
    if objective.skip_zero_variance:
        varied_P = varied_groups(rewards_PG)
        counted_PG &= varied_P[:, None]
        figures["groups/left_out"] = float((~varied_P).sum())
    if objective.overlong == "mask" or objective.skip_zero_variance:
        figures["responses/left_out"] = float((~counted_PG).sum())
    advantages_PG = group_advantages(rewards_PG, scale_by_std=objective.scale_by_std)
    return Credit(np.asarray(advantages_PG), counted_PG, figures)


def join_figures(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Figures of equal parts of a step -> of the whole: what is left out is a sum, the rest are means."""
    return {
        name: sum(part[name] for part in parts) / (1 if name.endswith("/left_out") else len(parts))
        for name in parts[0]
    }
