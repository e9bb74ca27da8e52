"""Rewards -> credit: the advantage of each response, and the share of the loss of each of its tokens (NumPy).

Owns what the settings do to rewards between grading and packing: penalties for length, responses and groups
that are left out, the figures of both; and the weights of tokens, from the counts of the whole optimiser step
on all hosts. Must not know how rewards were graded, nor how rows are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ngrpo_jax.algo.objectives import group_advantages, overlong_penalty, varied_groups
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings

Gather = Callable[[Any], list[Any]]  # what every host says (by its number), given what this one says


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


def one_host(value: Any) -> list[Any]:
    """The `Gather` of a run on one host."""
    return [value]


def token_weights(
    lengths_B: np.ndarray,
    mixed_BT: np.ndarray,
    *,
    aggregate: str,
    loss_on_mixed: bool,
    max_new_tokens: int,
    counted_B: np.ndarray | None = None,
    gather: Gather = one_host,
) -> np.ndarray:
    """Each response token's share of an optimiser step's loss, float32 [B, T].

    Args:
      lengths_B: response lengths of this host's sequences of the step.
      mixed_BT: positions whose input was mixed.
      aggregate: "sequence": mean over each response, then over responses (13); "token": mean over all
        tokens; "constant": sum over tokens, divided by responses × max_new_tokens.
      loss_on_mixed: false gives mixed positions weight 0 and leaves the other weights as they are.
      counted_B: bool, the sequences that take part, all by default; the others get weight 0, and the means
        above are over the rest. With none left all weights are 0.
      gather: asks the other hosts of the step for their counts.
    """
    counted_B = np.ones(len(lengths_B), bool) if counted_B is None else counted_B
    counts = gather([int(counted_B.sum()), int(lengths_B[counted_B].sum())])
    count, total = (max(sum(of_hosts), 1) for of_hosts in zip(*counts, strict=True))
    real_BT = (np.arange(mixed_BT.shape[1]) < lengths_B[:, None]) & counted_B[:, None]
    share_B = {
        "sequence": 1.0 / (count * lengths_B),
        "token": np.full(len(lengths_B), 1.0 / total),
        "constant": np.full(len(lengths_B), 1.0 / (count * max_new_tokens)),
    }[aggregate]
    weight_BT = np.where(real_BT, share_B[:, None], 0.0)
    if not loss_on_mixed:
        weight_BT = np.where(mixed_BT, 0.0, weight_BT)
    return weight_BT.astype(np.float32)
