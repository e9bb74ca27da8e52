"""The compiled programs of a rollout: their few shapes, and all of them compiled before the first prompt.

Owns what follows from a request for the programs, and with shapes.py is the only caller of decode.py and
slots.py: a rollout, `compile_ahead` and shapes.py take their programs from the same `Programs`, so that
nothing is left to compile once a rollout begins. Must not know which sequence is in which slot.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from ngrpo_jax.algo.mixture import tail_length
from ngrpo_jax.model import ring_attention
from ngrpo_jax.model.inference import InferenceModel
from ngrpo_jax.rollout import decode
from ngrpo_jax.rollout import slots as slot_state
from ngrpo_jax.rollout.request import RolloutRequest
from ngrpo_jax.rollout.sharding import SlotSharding
from ngrpo_jax.rollout.slots import Insertions, Prefix, Slots

CACHE_RATIO = 1.5  # of one cache size to the next
MOST_CACHE_SIZES = 6
MOST_HALVINGS = 3
_LEAST_ROWS = 4  # of a shard: products of fewer rows take as long, and those of one row round otherwise
_HALVED_FROM = 16  # chunks of the longest response: fewer do not repay the programs of halved slots
GRAIN = 32  # cache sizes and padded prompt lengths are multiples of it


def cache_sizes(capacity: int, model: InferenceModel) -> tuple[int, ...]:
    """The few cache lengths of a rollout, rising to `capacity`: one where a step reads what rows hold alone.

    Elsewhere a step reads the whole of its cache, so that short contexts need a short one; each size is a
    compilation.
    """
    width = ring_attention.grain(model.platform, model.config.head_dim, capacity) if model.ring else None
    if width is not None:
        return (_round_up(capacity, width),)
    sizes, floor = [_round_up(capacity, GRAIN)], 2 * GRAIN
    while len(sizes) < MOST_CACHE_SIZES and sizes[-1] > floor:
        sizes.append(max(floor, min(sizes[-1] - GRAIN, _round_up(int(sizes[-1] / CACHE_RATIO), GRAIN))))
    return tuple(reversed(sizes))


def prompt_lengths(longest: int) -> tuple[int, ...]:
    """The few lengths that prompts are padded to, the last one holding `longest` tokens."""
    lengths = [GRAIN]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return (*lengths[:-1], _round_up(longest, GRAIN))


def decode_shapes(request: RolloutRequest, shards: int, model: InferenceModel) -> dict[int, tuple[int, ...]]:
    """Numbers of slots, falling by halves -> the cache sizes that so many slots can have, rising.

    When no sequence waits for a slot, the slots are halved as sequences end. The last sequences of a rollout
    are long ones, so that fewer slots have the larger sizes alone: 6 + 3 + 2 + 1 programs at most.
    """
    sizes = cache_sizes(request.max_prompt_tokens + request.max_new_tokens, model)
    shapes = {_round_up(request.slots, shards): sizes}
    if request.max_new_tokens >= _HALVED_FROM * request.chunk:
        for parts in range(2, MOST_HALVINGS + 2):
            half = min(shapes) // 2
            if min(shapes) % (2 * shards) == 0 and half >= _LEAST_ROWS * shards:
                shapes[half] = sizes[-max(1, len(sizes) // parts) :]
    return shapes


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a request on the devices of its parameters: shapes and static arguments.

    Attributes:
      shapes: as of `decode_shapes`.
      prefill_rows: prompts of one prefill.
      prompt_lengths: numbers of tokens that prompts are padded to.
    """

    request: RolloutRequest
    model: InferenceModel
    shapes: dict[int, tuple[int, ...]]
    prefill_rows: int
    prompt_lengths: tuple[int, ...]
    sharding: SlotSharding

    @classmethod
    def of(cls, request: RolloutRequest, params: Any) -> Self:
        """For parameters in the inference layout: arrays, or jax.ShapeDtypeStruct with a sharding."""
        sharding = SlotSharding.of(request.sharding, params)
        device = next(iter(params["final_norm"]["scale"].sharding.device_set))
        model = InferenceModel(request.config, device.platform, request.attention)
        shapes = decode_shapes(request, sharding.shards, model)
        return cls(
            request,
            model,
            shapes,
            prefill_rows=_round_up(max(1, max(shapes) // request.samples), sharding.shards),
            prompt_lengths=prompt_lengths(request.max_prompt_tokens),
            sharding=sharding,
        )

    @property
    def shards(self) -> int:
        """Parts that the slots are split into."""
        return self.sharding.shards

    @property
    def slots(self) -> int:
        """The request's slots, rounded up to a multiple of the shards."""
        return max(self.shapes)

    @property
    def cache_sizes(self) -> tuple[int, ...]:
        """Numbers of columns that the cache of all slots can have, rising."""
        return self.shapes[self.slots]

    def empty(self) -> Slots:
        """Slots without a sequence, with the smallest cache."""
        return slot_state.empty(self.cache_sizes[0], **self.of_empty())

    def prefill(self, params: Any, prompts: Sequence[Sequence[int]]) -> Prefix:
        """At most `prefill_rows` prompts, padded to that number and to one of the few lengths."""
        length = _smallest(self.prompt_lengths, max(map(len, prompts)))
        ids_BT = np.zeros((self.prefill_rows, length), np.int32)
        lengths_B = np.ones(self.prefill_rows, np.int32)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = prompt
            lengths_B[row] = len(prompt)
        return decode.prefill(params, ids_BT, lengths_B, **self.of_prefill())

    def insert(self, slots: Slots, prefix: Prefix, insertions: Insertions) -> Slots:
        """The slots, whose cache has at least the prefix's columns, with new sequences; donates the slots."""
        return slot_state.insert(slots, prefix, insertions, sharding=self.sharding)

    def resize(self, slots: Slots, columns: int) -> Slots:
        """The slots with a cache of at least so many columns, reached by one size after the other.

        So the programs to compile are those between neighbouring sizes. Where the cache shrinks, it keeps one
        size more than is needed, lest it go back and forth at every insertion.
        """
        sizes = self.shapes[len(slots.active_B)]
        at, wanted = sizes.index(slots.cache.columns), sizes.index(_smallest(sizes, columns))
        while at < wanted or at > wanted + 1:
            at += 1 if at < wanted else -1
            slots = slot_state.resize(slots, sizes[at])
        return slots

    def fewer(self, slots: int, needed: int, columns: int) -> int | None:
        """The next number of slots below `slots`; None where a step of so few slots would read no less."""
        half = max((count for count in self.shapes if count < slots), default=0)
        if half < max(needed, 1):
            return None
        read, of_half = (count * _smallest(self.shapes[count], columns) for count in (slots, half))
        return half if of_half < read else None

    def keep(self, slots: Slots, count: int, places_B: np.ndarray, columns: int) -> Slots:
        """The next fewer slots, with a cache of at least so many columns that so few can have."""
        size = _smallest(self.shapes[count], columns)
        while slots.cache.columns != size:
            sizes = self.shapes[len(slots.active_B)]
            at = sizes.index(slots.cache.columns)
            slots = slot_state.resize(slots, sizes[at + 1 if sizes[at] < size else at - 1])
        return slot_state.keep(slots, places_B, self.sharding)

    def decode(self, params: Any, table_VC: Any | None, slots: Slots) -> tuple[Slots, decode.ChunkOutput]:
        """The slots one chunk later, and what the chunk generated; donates the slots."""
        return decode.decode_chunk(params, table_VC, slots, **self.of_decode())

    def of_empty(self) -> dict[str, Any]:
        """Static arguments of `slots.empty`."""
        tail = tail_length(self.request.sampling.mixing.until_ids)
        return dict(config=self.request.config, count=self.slots, tail=tail, sharding=self.sharding)

    def of_prefill(self) -> dict[str, Any]:
        """Static arguments of `decode.prefill` and of its parts."""
        return dict(model=self.model, sharding=self.sharding)

    def of_decode(self) -> dict[str, Any]:
        """Static arguments of `decode.decode_chunk`."""
        request = self.request
        return dict(model=self.model, sampling=request.sampling, steps=request.chunk, sharding=self.sharding)


def compile_ahead(
    params: Any,
    request: RolloutRequest,
    table_VC: Any | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Runs every program that a rollout of this request may need once, without a sequence; seconds.

    They are run because `jax.jit` does not find programs again that `.lower().compile()` has compiled.

    Args:
      params: in the inference layout.
      table_VC: as of `engine.rollout`; where it is missing, a table of the same shape stands in.
      progress: called with the number of sizes that are compiled, and of all.
    """
    begun = time.perf_counter()
    programs, mixing = Programs.of(request, params), request.sampling.mixing
    halves = [programs.shapes[half] for _, half in itertools.pairwise(programs.shapes)]
    total, done = (
        len(programs.prompt_lengths) + len(programs.cache_sizes) + sum(map(len, halves)),
        itertools.count(1),
    )
    if not mixing.uses_table:
        table_VC = None
    elif table_VC is None:
        table_VC = programs.sharding.whole(np.zeros((request.config.vocab_size, mixing.k), np.int32))
    prefixes = []
    for length in programs.prompt_lengths:
        prefixes.append(programs.prefill(params, [[0] * length]))
        progress(next(done), total)
    nothing = Insertions.none(programs.slots, programs.shards)
    slots = programs.empty()
    for columns in programs.cache_sizes:
        slots = programs.resize(slots, columns)
        for prefix in prefixes:
            if prefix.cache.columns <= columns:
                slots = programs.insert(slots, prefix, nothing)
        slots, _ = programs.decode(params, table_VC, slots)
        progress(next(done), total)
    slots = programs.resize(slots, 1)
    for count, half in itertools.pairwise(programs.shapes):
        for columns in programs.shapes[half]:
            del slots  # its cache, before another one is made
            slots = slot_state.empty(columns, **programs.of_empty() | {"count": count})
            slots = programs.keep(slots, half, np.zeros(half, np.int32), columns)
            slots, _ = programs.decode(params, table_VC, slots)
            progress(next(done), total)
        slots = programs.resize(programs.resize(slots, 1), programs.shapes[half][-1])
    jax.block_until_ready(slots)
    return time.perf_counter() - begun


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _smallest(sizes: Sequence[int], need: int) -> int:
    """The smallest of rising sizes that holds `need`; the largest where none does."""
    return next((size for size in sizes if size >= need), sizes[-1])
