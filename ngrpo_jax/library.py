"""The method for notebooks, without a run: its loss of trajectories, and what was mixed, as text.

Owns nothing of its own: each function joins parts of other rooms for one host and one device. docs/library.md
shows how they are used; `ngrpo_jax` exports them, and imports them when they are first named.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ngrpo_jax.learner.advantages import compute_advantages, token_weights
from ngrpo_jax.learner.loss import ForwardOptions, row_logprobs, row_loss
from ngrpo_jax.learner.packing import Batch, RowLayout, pack
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings
from ngrpo_jax.tasks import prompts


class MixedToken(NamedTuple):
    """A mixed token of a response: its place, its text, and text and weight of each candidate."""

    position: int
    text: str
    candidates: list[tuple[str, float]]


def grpo_loss(
    params: Any,
    config: ModelConfig,
    prompt_ids: Sequence[Sequence[int]],
    trajectories: Trajectories,
    rewards: Any,
    *,
    temperature: float,
    objective: ObjectiveSettings | None = None,
    reference: Any = None,
) -> jax.Array:
    """The loss (13) of responses, with their mixtures replayed through `params`; differentiable in `params`.

    It is that of the first optimiser step after a rollout: the old policy is the one of `params`.

    Args:
      params: in the layout of `load`.
      config: the model's.
      prompt_ids: token ids of each of P prompts.
      trajectories: P × G responses, as `generate` returns them.
      rewards: numbers [P, G].
      temperature: the rollout's.
      objective: None: the paper's, without a KL term where there is no reference.
      reference: parameters of the KL term's model; needed where `objective.kl_coef` is above 0.

    Returns:
      float32 scalar.

    Raises:
      ValueError: a reference that is missing, or rewards of another shape.
    """
    if objective is None:
        objective = ObjectiveSettings()
        objective = objective if reference is not None else dataclasses.replace(objective, kl_coef=0.0)
    if objective.kl_coef > 0 and reference is None:
        raise ValueError(f"kl_coef is {objective.kl_coef}; give reference=, or set objective.kl_coef to 0")
    rewards_PG = np.asarray(rewards, np.float32)
    if (
        rewards_PG.ndim != 2
        or rewards_PG.size != len(trajectories.lengths_B)
        or len(rewards_PG) != len(prompt_ids)
    ):
        raise ValueError(
            f"rewards have shape {rewards_PG.shape}; {len(prompt_ids)} prompts with "
            f"{len(trajectories.lengths_B)} responses need [prompts, samples]"
        )
    computed = compute_advantages(rewards_PG, trajectories, objective)
    repeated = [prompt for prompt in prompt_ids for _ in range(rewards_PG.shape[1])]
    included_B = computed.included_PG.reshape(-1)
    batch = Batch(repeated, trajectories, computed.advantages_PG.reshape(-1), included_B)
    longest = max(map(len, prompt_ids)) + trajectories.tokens_BT.shape[1]
    rows = pack(batch, token_weights(trajectories, objective, included_B), RowLayout(longest, 1))
    options = ForwardOptions(config, temperature)
    reference_RT = None
    if objective.kl_coef > 0:
        reference_RT = jax.lax.stop_gradient(row_logprobs(reference, rows, options))
    return row_loss(params, rows, None, reference_RT, objective=objective, options=options)[0]


def mixed_tokens(tokenizer: Any, trajectories: Trajectories, index: int) -> list[MixedToken]:
    """The mixed tokens of response `index`, with their candidates, the anchor first."""

    def text(token: int) -> str:
        return tokenizer.decode([int(token)], skip_special_tokens=False)

    tokens = trajectories.response(index)
    mixed_T = trajectories.mixed_BT[index, : len(tokens)]
    mixtures = trajectories.mixtures
    return [
        MixedToken(
            at,
            text(tokens[at]),
            [
                (text(token), float(weight))
                for token, weight in zip(mixtures.ids[index, at], mixtures.weights[index, at], strict=True)
            ],
        )
        for at in map(int, np.flatnonzero(mixed_T))
    ]


def response_text(tokenizer: Any, trajectories: Trajectories, index: int) -> str:
    """The text of response `index`, as a run grades it."""
    return prompts.response_text(tokenizer, trajectories.response(index))
