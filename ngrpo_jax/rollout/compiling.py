"""The few shapes that a rollout's programs are compiled for, and all of these programs ahead of time.

Owns what is asked of a rollout (`Plan`) and the shapes that follow (`Shapes`). Must not know who sits where
or what is written: nobody is seated here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.model import cache as kv
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import decode
from ngrpo_jax.rollout.scheduler import cache_sizes, no_seats, prompt_lengths, smallest


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of a rollout, as arguments of `engine.generate`; but for prompts and what each brings."""

    config: ModelConfig
    sampler: decode.Sampler
    samples: int
    max_new_tokens: int
    slots: int
    chunk: int
    max_prompt_tokens: int
    sharding: jax.sharding.NamedSharding | None = None


class Shapes(NamedTuple):
    """What the compiled programs of a rollout depend on, besides the parameters."""

    config: ModelConfig
    sampler: decode.Sampler
    slots: int
    chunk: int
    prompts: int  # of one prefill
    sizes: tuple[int, ...]  # cache columns
    lengths: tuple[int, ...]  # padded prompt lengths
    placement: decode.Placement | None

    @property
    def shards(self) -> int:
        """Parts that the slots are split into."""
        return 1 if self.placement is None else self.placement.shards


def shapes_of(plan: Plan, params: Any) -> Shapes:
    """The shapes of a plan's programs, for parameters that are laid out (arrays, or their shapes)."""
    placement = None if plan.sharding is None else decode.Placement.of(plan.sharding, params)
    shards = 1 if placement is None else placement.shards
    slots = -(-plan.slots // shards) * shards
    prompts = -(-max(1, slots // plan.samples) // shards) * shards
    lengths = prompt_lengths(plan.max_prompt_tokens)
    sizes = cache_sizes(plan.max_prompt_tokens + plan.max_new_tokens)
    return Shapes(plan.config, plan.sampler, slots, plan.chunk, prompts, sizes, lengths, placement)


def empty_slots(shapes: Shapes) -> decode.Slots:
    """Slots in which nobody sits, with the smallest cache."""
    return decode.empty_slots(shapes.config, shapes.sampler, shapes.slots, shapes.sizes[0], shapes.placement)


def prefilled(params: Any, prompts: Sequence[Sequence[int]], shapes: Shapes) -> tuple[jax.Array, kv.KVCache]:
    """Prompts, padded to a prefill's rows and one of its few lengths -> (hidden states [P, D], cache)."""
    ids_BT = np.zeros((shapes.prompts, smallest(shapes.lengths, max(map(len, prompts)))), np.int32)
    lengths_B = np.ones(shapes.prompts, np.int32)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
    return decode.prefill(params, ids_BT, lengths_B, config=shapes.config, placement=shapes.placement)


def decoded(
    params: Any, table_VC: Any | None, state: decode.Slots, shapes: Shapes
) -> tuple[decode.Slots, decode.Written]:
    """The slots a chunk later, and what they wrote."""
    return decode.decode_chunk(
        params, table_VC, state,
        config=shapes.config, sampler=shapes.sampler, steps=shapes.chunk, placement=shapes.placement,
    )  # fmt: skip


def compile_ahead(params: Any, plan: Plan, table_VC: Any | None = None) -> float:
    """Runs every program that `engine.generate` may need for such a plan once, with nobody seated; seconds.

    Args: as of `generate`; `params` laid out.
    """
    begun = time.perf_counter()
    shapes = shapes_of(plan, params)
    prefixes = [prefilled(params, [[0] * length], shapes) for length in shapes.lengths]
    nobody = no_seats(shapes.shards, shapes.slots // shapes.shards)
    state = empty_slots(shapes)
    there_and_back = (*shapes.sizes, *shapes.sizes[-2::-1])
    for turn, size in enumerate(there_and_back):
        if size != state.cache.columns:
            state = decode.stretch(state, size)
        if turn >= len(shapes.sizes):
            continue
        for hidden_PD, prefix in prefixes:
            if prefix.columns <= size:
                state = decode.fill(state, hidden_PD, prefix, nobody, placement=shapes.placement)
        state, _ = decoded(params, table_VC, state, shapes)
    jax.block_until_ready(state)
    return time.perf_counter() - begun


def compile_largest(params: Any, plan: Plan, table_VC: Any | None = None) -> dict[str, jax.stages.Compiled]:
    """Compiles the largest programs of such a rollout, by name, from shapes alone: nothing is run.

    Args: as of `generate`; `params` laid out and, like `table_VC`, jax.ShapeDtypeStruct with a sharding.
    """
    shapes = shapes_of(plan, params)
    config, sampler, on = shapes.config, shapes.sampler, shapes.placement
    ids_BT = jax.ShapeDtypeStruct((shapes.prompts, shapes.lengths[-1]), jnp.int32)
    lengths_B = jax.ShapeDtypeStruct((shapes.prompts,), jnp.int32)
    prefill = decode.prefill.lower(params, ids_BT, lengths_B, config=config, placement=on)
    empty = decode.empty_slots.lower(config, sampler, shapes.slots, shapes.sizes[-1], on)
    compiled = {"prefill": prefill.compile(), "empty_slots": empty.compile()}
    hidden_PD, prefix = _results(prefill, compiled["prefill"])
    state = _results(empty, compiled["empty_slots"])
    nobody = no_seats(shapes.shards, shapes.slots // shapes.shards)
    fill = decode.fill.lower(state, hidden_PD, prefix, nobody, placement=on)
    decoding = decode.decode_chunk.lower(
        params, table_VC, state, config=config, sampler=sampler, steps=shapes.chunk, placement=on
    )
    return {**compiled, "fill": fill.compile(), "decode_chunk": decoding.compile()}


def _results(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> Any:
    """The shapes of a program's results, with the shardings that the compiler gave them."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
