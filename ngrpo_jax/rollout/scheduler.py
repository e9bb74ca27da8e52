"""Who waits, who sits where, and from which prefill the next sequences start: host bookkeeping alone.

Sequences enter in their order. Knows numbers and lengths; neither devices nor what a sequence writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ngrpo_jax.rollout.decode import Seats

FREE = -1
RATIO = 1.5  # of one cache size to the next
MOST_SIZES = 6
GRAIN = 32  # cache sizes and prompt lengths are multiples of it


def cache_sizes(capacity: int, shortest: int = 1) -> tuple[int, ...]:
    """The few cache lengths of a rollout, rising to `capacity`; none below `shortest` but it itself.

    A step reads the whole of its cache, so that short contexts want a short one; each size is a compilation.
    """
    sizes = [_round_up(capacity, GRAIN)]
    floor = max(_round_up(shortest, GRAIN), 2 * GRAIN)
    while len(sizes) < MOST_SIZES and sizes[-1] > floor:
        sizes.append(max(floor, min(sizes[-1] - GRAIN, _round_up(int(sizes[-1] / RATIO), GRAIN))))
    return tuple(reversed(sizes))


def prompt_lengths(longest: int) -> tuple[int, ...]:
    """The few lengths that prompts are padded to, the last one holding `longest` tokens."""
    lengths = [GRAIN]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return (*lengths[:-1], _round_up(longest, GRAIN))


def smallest(sizes: Sequence[int], need: int) -> int:
    """The smallest of rising sizes that holds `need`; the largest where none does."""
    return next((size for size in sizes if size >= need), sizes[-1])


class Seating:
    """The sequences of a rollout over its slots.

    Args:
      lengths_P: prompt lengths.
      limits_B: bounds of the response lengths, one a sequence, prompt-major.
      samples: sequences a prompt.
      keys_B2: uint32 key data of each sequence.
      slots: of all shards together.
      shards: parts of equal size that the slots are split into.
      prompts: of one prefill.
    """

    def __init__(
        self,
        lengths_P: np.ndarray,
        limits_B: np.ndarray,
        samples: int,
        keys_B2: np.ndarray,
        *,
        slots: int,
        shards: int,
        prompts: int,
    ) -> None:
        self._lengths_B = np.repeat(lengths_P, samples)
        self._limits_B, self._samples, self._keys_B2 = limits_B, samples, keys_B2
        self._shards, self._prompts = shards, prompts
        self.sequence_B = np.full(slots, FREE)  # the sequence in each slot
        self._steps_B = np.zeros(slots, np.int64)  # decode steps since it sat down
        self._next = 0  # the first sequence that waits
        # The last prefill holds the prompts from the first of these to below the second.
        self._first = self._prefilled = 0

    @property
    def waiting(self) -> bool:
        """Whether any sequence has no slot yet."""
        return self._next < len(self._keys_B2)

    @property
    def seated(self) -> bool:
        """Whether anybody sits."""
        return bool((self.sequence_B != FREE).any())

    def wants_prefill(self) -> range | None:
        """The next prompts to prefill, where a free slot waits for one of them."""
        if not self.waiting or not (self.sequence_B == FREE).any():
            return None
        if self._next // self._samples < self._prefilled:
            return None
        self._first = self._prefilled
        self._prefilled = min(self._first + self._prompts, len(self._lengths_B) // self._samples)
        return range(self._first, self._prefilled)

    def seat(self) -> Seats | None:
        """Seats as many waiting sequences of the last prefill as there are free slots; None for nobody."""
        free = self._free_slots()
        last = min(self._next + len(free), self._prefilled * self._samples)
        sequences = np.arange(self._next, last)
        if not len(sequences):
            return None
        free, self._next = free[: len(sequences)], last
        self.sequence_B[free], self._steps_B[free] = sequences, 0
        width = len(self.sequence_B) // self._shards
        seats = no_seats(self._shards, width)
        for slot, sequence in zip(free, sequences, strict=True):
            shard = slot // width
            place = shard * width + seats.count[shard]
            seats.count[shard] += 1
            seats.slot[place] = slot % width
            seats.source[place] = sequence // self._samples - self._first
            seats.keys[place] = self._keys_B2[sequence]
            seats.limits[place] = self._limits_B[sequence]
        return seats

    def _free_slots(self) -> np.ndarray:
        """Free slots, the shards taking turns, so that none seats all newcomers while others look on."""
        width = len(self.sequence_B) // self._shards
        turns = np.arange(len(self.sequence_B)).reshape(self._shards, width).T.reshape(-1)
        return turns[self.sequence_B[turns] == FREE]

    def columns_needed(self, steps: int) -> int:
        """Cache columns that the seated sequences fill at most in the next `steps` steps."""
        taken = self.sequence_B != FREE
        sequences = self.sequence_B[taken]
        written = np.minimum(self._steps_B[taken] + steps, self._limits_B[sequences])
        return int((self._lengths_B[sequences] + written).max(initial=1))

    def advance(self, steps: int) -> np.ndarray:
        """Notes that a chunk has been started; returns who sits where in it, [slots]."""
        self._steps_B += steps
        return self.sequence_B.copy()

    def release(self, sequences: Sequence[int]) -> None:
        """Frees the slots of sequences that have ended."""
        self.sequence_B[np.isin(self.sequence_B, sequences)] = FREE


def no_seats(shards: int, width: int) -> Seats:
    """Seats for nobody, `width` a shard."""
    size = shards * width
    return Seats(
        count=np.zeros(shards, np.int32),
        slot=np.zeros(size, np.int32),
        source=np.zeros(size, np.int32),
        keys=np.zeros((size, 2), np.uint32),
        limits=np.zeros(size, np.int32),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
