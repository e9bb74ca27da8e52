"""Which sequence is in which slot, and which row of which prefill it continues: bookkeeping on the host.

Knows numbers and lengths; neither devices nor what a sequence generates. Sequences enter in their order.
Three chunks over three slots (`|` ends a chunk, a digit is a token of that sequence, `.` a step of a slot
whose sequence has ended):

    queue    3 4 5 ..     4 5 ..       5 ..        -> inserted when a chunk has ended with a free slot
    slot 0   0 0 0 0    | 0 0 0 0    | 0 0 . .     released after the chunk in which it ends
    slot 1   1 1 . .    | 3 3 3 3    | 3 3 3 3
    slot 2   2 2 2 2    | 2 . . .    | 4 4 4 4

When the queue is empty and half of the slots would do, the sequences move to that half (`keep`).

Letter of this file: I insertions, as in slots.py.
"""

from collections.abc import Sequence

import numpy as np

from ngrpo_jax.rollout.request import Sequences
from ngrpo_jax.rollout.slots import Insertions

FREE = -1


class SlotScheduler:
    """The sequences of a rollout over its slots.

    Args:
      sequences: prompt-major, of the same number for each prompt.
      slots: of all shards together.
      shards: parts of equal size that the slots are split into.
      prefill_rows: prompts of one prefill.
    """

    def __init__(self, sequences: Sequences, *, slots: int, shards: int, prefill_rows: int) -> None:
        self._sequences = sequences
        self._samples = len(sequences.keys_B2) // len(sequences.prompts)
        self._prompt_lengths_B = np.repeat([len(prompt) for prompt in sequences.prompts], self._samples)
        self._shards, self._prefill_rows = shards, prefill_rows
        self._sequence_B = np.full(slots, FREE)  # the sequence in each slot
        self._steps_B = np.zeros(slots, np.int64)  # decode steps since its insertion
        self._next = 0  # the first sequence of the queue
        # The last prefill holds the prompts from the first of these to below the second.
        self._first = self._prefilled = 0

    @property
    def queued(self) -> bool:
        """Whether any sequence has had no slot yet."""
        return self._next < len(self._sequences.keys_B2)

    @property
    def active(self) -> bool:
        """Whether any slot holds a sequence."""
        return bool((self._sequence_B != FREE).any())

    def next_prefill(self) -> range | None:
        """The next prompts to prefill, where there is a free slot and the last prefill is used up."""
        if not self.queued or not (self._sequence_B == FREE).any():
            return None
        if self._next // self._samples < self._prefilled:
            return None
        self._first = self._prefilled
        self._prefilled = min(self._first + self._prefill_rows, len(self._sequences.prompts))
        return range(self._first, self._prefilled)

    def next_insertions(self) -> Insertions | None:
        """As many queued sequences of the last prefill as there are free slots; None for no sequence."""
        free = self._free_slots()
        last = min(self._next + len(free), self._prefilled * self._samples)
        sequences = np.arange(self._next, last)
        if not len(sequences):
            return None
        free, self._next = free[: len(sequences)], last
        self._sequence_B[free], self._steps_B[free] = sequences, 0
        width = len(self._sequence_B) // self._shards
        insertions = Insertions.none(len(self._sequence_B), self._shards)
        for slot, sequence in zip(free, sequences, strict=True):
            shard = slot // width
            i = shard * width + insertions.count[shard]
            insertions.count[shard] += 1
            insertions.slot_I[i] = slot % width
            insertions.row_I[i] = sequence // self._samples - self._first
            insertions.keys_I2[i] = self._sequences.keys_B2[sequence]
            insertions.limits_I[i] = self._sequences.limits_B[sequence]
        return insertions

    def _free_slots(self) -> np.ndarray:
        """Free slots, one of each shard after the other, so that the shards have equally many sequences."""
        slots = len(self._sequence_B)
        alternating = np.arange(slots).reshape(self._shards, slots // self._shards).T.reshape(-1)
        return alternating[self._sequence_B[alternating] == FREE]

    @property
    def slots_needed(self) -> int:
        """The fewest slots, equally many in each shard, that have room; all of them while any is queued."""
        if self.queued:
            return len(self._sequence_B)
        taken = (self._sequence_B != FREE).reshape(self._shards, -1)
        return self._shards * int(taken.sum(axis=1).max())

    def keep(self, slots: int) -> np.ndarray:
        """Leaves so many slots; returns the place within its shard that each of them had, int32 [slots]."""
        free = (self._sequence_B == FREE).reshape(self._shards, -1)
        places = np.argsort(free, axis=1, kind="stable")[:, : slots // self._shards]
        for name in ("_sequence_B", "_steps_B"):
            by_shard = getattr(self, name).reshape(self._shards, -1)
            setattr(self, name, np.take_along_axis(by_shard, places, axis=1).reshape(-1))
        return places.reshape(-1).astype(np.int32)

    def columns_needed(self, steps: int) -> int:
        """Cache columns that the sequences in the slots fill at most in the next `steps` steps."""
        taken = self._sequence_B != FREE
        sequences = self._sequence_B[taken]
        generated = np.minimum(self._steps_B[taken] + steps, self._sequences.limits_B[sequences])
        return int((self._prompt_lengths_B[sequences] + generated).max(initial=1))

    def advance(self, steps: int) -> np.ndarray:
        """Notes that a chunk has been started; returns the sequence in each slot of it, FREE for none."""
        self._steps_B += steps
        return self._sequence_B.copy()

    def release(self, sequences: Sequence[int]) -> None:
        """Frees the slots of sequences that have ended."""
        self._sequence_B[np.isin(self._sequence_B, sequences)] = FREE
