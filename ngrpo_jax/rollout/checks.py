"""Every refusal of `engine.generate`: one sentence each, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout.decode import Sampler


def check_arguments(
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    sampler: Sampler,
    samples: int,
    max_new_tokens: int,
    limits_B: np.ndarray,
    slots: int,
    chunk: int,
    max_prompt_tokens: int | None,
    table_VC: Any | None,
) -> None:
    """Raises ValueError for arguments of `generate` that cannot be right."""
    if not prompts:
        raise ValueError("prompts is empty; generate needs at least one.")
    counts = dict(samples=samples, slots=slots, chunk=chunk, max_new_tokens=max_new_tokens)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more.")
    _check_prompts(prompts, config, max_prompt_tokens)
    _check_sampler(sampler, config)
    if limits_B.shape != (len(prompts) * samples,) or limits_B.min() < 1 or limits_B.max() > max_new_tokens:
        raise ValueError(
            f"lengths_B must hold a number from 1 to max_new_tokens = {max_new_tokens} for each of the "
            f"{len(prompts) * samples} sequences."
        )
    if table_VC is not None and sampler.mixing.uses_table:
        need = (config.vocab_size, sampler.mixing.k)
        if tuple(table_VC.shape) != need:
            raise ValueError(
                f"the neighbour table has shape {tuple(table_VC.shape)}; this model and k need {need}."
            )


def _check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig, longest: int | None) -> None:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty; it needs at least one token.")
        if longest is not None and len(prompt) > longest:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, but the cache has room for {longest}; leave it "
                "out or raise max_prompt_tokens."
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {index} holds a token outside the vocabulary of {config.vocab_size} rows."
            )


def _check_sampler(sampler: Sampler, config: ModelConfig) -> None:
    if sampler.temperature < 0 or not 0 < sampler.top_p <= 1 or sampler.top_k < 0:
        raise ValueError(
            f"temperature {sampler.temperature} must be 0 or above, top_p {sampler.top_p} in (0, 1], "
            f"top_k {sampler.top_k} 0 or above."
        )
    if sampler.mixing.mixes and sampler.temperature == 0:
        raise ValueError(
            "temperature is 0 with mixing on; the weights of a mixture need a temperature above 0."
        )
    for stop in sampler.stop_ids:
        if not 0 <= stop < config.vocab_size:
            raise ValueError(f"stop id {stop} lies outside the vocabulary of {config.vocab_size} rows.")
