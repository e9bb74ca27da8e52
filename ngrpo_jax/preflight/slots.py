"""How many sequences a rollout decodes side by side where `rollout.slots` is None: as many as fit.

A function of settings, prompts' lengths and the whole memory of a device: a run that is started again on the
same devices has the same number, whatever else these do. Must not refuse anything (fit.py).
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import fit, memory
from ngrpo_jax.settings import Settings

# Where a device has no memory of its own, as a CPU, or nobody knows how much: measured on two CPU cores by
# `benchmarks/rollout.py --by-slots`.
UNBOUNDED = 64
GRAIN = 8  # slots of each part that they are split into: halved three times as sequences end


def for_training(
    settings: Settings,
    config: ModelConfig,
    devices: jax.sharding.Mesh,
    longest_prompt: int,
    room: int | None,
) -> Settings:
    """The settings with a number of slots: what fits beside the learner's state, at most a step's sequences.

    Args:
      longest_prompt: tokens of the longest prompt of the training and held-out sets.
      room: bytes of a device's whole memory; None where it has none of its own.
    """

    def needed(changed: Settings) -> int:
        return memory.peak(fit.training_memory(changed, config, devices))[0]

    own = settings.rollout
    return decided(settings, needed, own.prompts * own.group, longest_prompt, room)


def for_evaluation(
    settings: Settings, config: ModelConfig, sequences: int, longest_prompt: int, room: int | None
) -> Settings:
    """The same for `evaluate`, which holds the parameters alone beside so many sequences."""

    def needed(changed: Settings) -> int:
        return memory.peak(memory.evaluation_estimate(changed, config))[0]

    return decided(settings, needed, sequences, longest_prompt, room)


def decided(
    settings: Settings,
    needed: Callable[[Settings], int],
    sequences: int,
    longest_prompt: int,
    room: int | None,
) -> Settings:
    """The settings with a number of slots; as they are where `rollout.slots` is given.

    Args:
      needed: bytes on a device with settings that have slots.
      sequences: the most slots that have a use.
    """
    if settings.rollout.slots is not None:
        return settings
    grid = settings.mesh
    parts = grid.data * grid.fsdp * (grid.tensor if settings.rollout.layout == "replicated" else 1)
    useful = parts * math.ceil(sequences / parts)
    if room is None:
        return settings.with_slots(min(UNBOUNDED, useful))
    grain = GRAIN * parts
    data = dataclasses.replace(settings.data, max_prompt_tokens=longest_prompt)
    measured = dataclasses.replace(settings, data=data)

    def fits(count: int) -> bool:
        return fit.ESTIMATE_ERROR * needed(measured.with_slots(grain * count)) <= room

    return settings.with_slots(min(useful, grain * _largest(fits, math.ceil(useful / grain))))


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest of 1..most that meets a condition which all smaller ones meet too; 1 where none does."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
