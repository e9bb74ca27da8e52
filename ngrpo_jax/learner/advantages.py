"""Rewards -> advantages, and each response token's share of the loss (NumPy).

Owns what the objective's settings do between grading and packing: length penalties, responses and groups that
are left out of the update, the metrics of both, and the token weights, which are computed from the counts of
the whole optimiser step on all hosts. Must not know how rewards were graded, nor how rows are packed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ngrpo_jax.algo.objectives import group_advantages, overlong_penalty, varied_groups
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings

Allgather = Callable[[Any], list[Any]]  # this host's JSON value -> the values of all hosts, in host order


class Advantages(NamedTuple):
    """Advantages of P groups of G responses, in the order of their trajectories.

    Attributes:
      advantages_PG: float32.
      included_PG: bool, the responses that take part in the update: not those that ended in logits that are
        not finite. The others get weight 0, in the KL term as well, but still count in the mean and standard
        deviation of their group.
      metrics: of all hosts, for the step's row.
    """

    advantages_PG: np.ndarray
    included_PG: np.ndarray
    metrics: dict[str, float]


def single_host(value: Any) -> list[Any]:
    """The `Allgather` of a run on one host."""
    return [value]


def compute_advantages(
    rewards_PG: np.ndarray,
    trajectories: Trajectories,
    objective: ObjectiveSettings,
    allgather: Allgather = single_host,
) -> Advantages:
    """(12), after length penalties; responses and groups that `objective` leaves out are marked.

    A group is left out for having equal rewards by its rewards after the penalty. All hosts hold equally many
    groups; each group is whole on its host, so only the metrics are gathered.
    """
    # Of such a response the rest is unknown, and an update on its beginning may spread what is wrong.
    included_PG = ~trajectories.nonfinite_B.reshape(rewards_PG.shape)
    metrics = {"responses/nonfinite": float(sum(allgather(int((~included_PG).sum()))))}
    if objective.overlong == "penalize":
        penalty_B = overlong_penalty(
            trajectories.lengths_B,
            trajectories.stopped_B,
            limit=trajectories.tokens_BT.shape[1],
            interval=objective.overlong_interval,
            size=objective.overlong_penalty,
        )
        rewards_PG = rewards_PG - penalty_B.reshape(rewards_PG.shape)
        metrics["reward/overlong_penalty"] = float(np.mean(allgather(float(penalty_B.mean()))))
    if objective.overlong == "mask":
        included_PG &= trajectories.stopped_B.reshape(rewards_PG.shape)
    if objective.skip_zero_variance:
        varied_P = varied_groups(rewards_PG)
        included_PG &= varied_P[:, None]
        metrics["groups/left_out"] = float(sum(allgather(int((~varied_P).sum()))))
    if objective.overlong == "mask" or objective.skip_zero_variance:
        metrics["responses/left_out"] = float(sum(allgather(int((~included_PG).sum()))))
    advantages_PG = group_advantages(rewards_PG, scale_by_std=objective.scale_by_std)
    return Advantages(np.asarray(advantages_PG), included_PG, metrics)


def token_weights(
    trajectories: Trajectories,
    objective: ObjectiveSettings,
    included_B: np.ndarray | None = None,
    allgather: Allgather = single_host,
) -> np.ndarray:
    """Each response token's share of an optimiser step's loss, float32 [B, T].

    Args:
      trajectories: this host's sequences of the step; T is the limit of new tokens.
      objective: `aggregate` "sequence" is the mean over each response's tokens, then over responses (13);
        "token" the mean over all tokens; "constant" the sum over tokens divided by responses × T.
        `loss_on_mixed` false gives weight 0 to tokens written at mixed steps, and leaves the other weights as
        they are.
      included_B: bool, the sequences that take part, all by default. The others get weight 0, and the means
        are over the rest; without any all weights are 0.
    """
    lengths_B, mixed_BT = trajectories.lengths_B, trajectories.mixed_BT
    time = mixed_BT.shape[1]
    included_B = np.ones(len(lengths_B), bool) if included_B is None else included_B
    counts = allgather([int(included_B.sum()), int(lengths_B[included_B].sum())])
    responses, tokens = (max(sum(of_hosts), 1) for of_hosts in zip(*counts, strict=True))
    share_B = {
        "sequence": 1.0 / (responses * np.maximum(lengths_B, 1)),
        "token": np.full(len(lengths_B), 1.0 / tokens),
        "constant": np.full(len(lengths_B), 1.0 / (responses * time)),
    }[objective.aggregate]
    weighted_BT = (np.arange(time) < lengths_B[:, None]) & included_B[:, None]
    if not objective.loss_on_mixed:
        weighted_BT &= ~mixed_BT
    return np.where(weighted_BT, share_B[:, None], 0.0).astype(np.float32)
