"""Prompts in, trajectories out, over a fixed number of slots.

Queued sequences are inserted into free slots, from a prefill of their prompts that the samples of a prompt
share; then all slots decode one chunk; then the slots of sequences that have ended are free again. When no
sequence is queued, the slots are halved as sequences end, so that no step computes mostly free rows. Where
host and device run side by side, the results of a chunk are read while the next one runs. Each sequence has
a key of its own, so that none of this changes what is sampled. Must not know a tokenizer, rewards or the
learner.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.errors import require
from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout.decode import ChunkOutput
from ngrpo_jax.rollout.programs import Programs
from ngrpo_jax.rollout.request import (
    NO_MIXING,
    RolloutRequest,
    SamplingParams,
    Sequences,
    make_sequences,
)
from ngrpo_jax.rollout.scheduler import FREE, SlotScheduler
from ngrpo_jax.rollout.slots import Prefix, Slots
from ngrpo_jax.rollout.trajectory import Trajectories


@dataclasses.dataclass
class RolloutStats:
    """Counts of a rollout, filled in as it goes.

    A step computes a row for every slot, whether it holds a sequence or not, so rows is the work that was
    done and tokens the work that was of use. `queued_` counts the same over the chunks that began with
    sequences in the queue, in which all slots are there. Times are wall seconds: prefill_s of the prefills
    beside which no chunk was running, decode_s of everything else.
    """

    sequences: int = 0
    done: int = 0
    slots: int = 0
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    queued_steps: int = 0
    queued_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows that generated a token."""
        return self.tokens / self.rows if self.rows else 0.0

    @property
    def queued_occupancy(self) -> float:
        """The same while sequences were queued; 0 where none ever was."""
        return self.queued_tokens / (self.queued_steps * self.slots) if self.queued_steps else 0.0


Progress = Callable[[RolloutStats], None]


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    mixing: Mixing | None = None,
    table_VC: Any | None = None,
    stop_ids: Sequence[int],
    seed: int = 0,
    keys_B: Any | None = None,
    lengths_B: Sequence[int] | np.ndarray | None = None,
    slots: int | None = None,
    chunk: int = 16,
    max_prompt_tokens: int | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    lookahead: int | None = None,
    stats: RolloutStats | None = None,
    progress: Progress | None = None,
) -> Trajectories:
    """Generates `samples` responses to each prompt: `rollout` of a request made from these arguments.

    Args:
      params: parameters as `model.hf.load` gives them, or in the inference layout.
      config: the model's; `config.dtype` is the dtype of matrix products and of the cache.
      prompts: token ids, ragged, none empty.
      samples: responses a prompt.
      max_new_tokens: bound on a response; the T of the result.
      temperature: divides the logits; 0 is greedy.
      top_p: nucleus of the distribution that top_k has left, renormalised.
      top_k: 0 for all tokens.
      mixing: what is done to inputs; None for nothing.
      table_VC: neighbour table [V, k]; when missing and needed, built over all rows of the input embedding
        (or of the head, by `mixing.table`).
      stop_ids: tokens that end a response; taken as given, may be empty.
      seed: of the default keys, fold_in(key(seed), i) for sequence i.
      keys_B: one key a sequence (typed keys or their uint32 data) instead of those.
      lengths_B: a bound of its own for each response, from 1 to max_new_tokens.
      slots: sequences decoded side by side; None: 64, or as many as there are sequences.
      chunk: decode steps between two insertions of new sequences.
      max_prompt_tokens: what the cache has room for; None: the longest of these prompts. Given, nothing
        compiles anew for other prompts.
      sharding: of arrays whose leading dimension is the slots; params must be on the same devices.
      lookahead: as in `RolloutRequest`.
      stats, progress: as in `rollout`.

    Returns:
      Trajectories with B = prompts × samples, prompt-major.

    Raises:
      UserError: an argument that cannot be right, by name.
    """
    count = len(prompts) * samples
    request = RolloutRequest(
        config,
        SamplingParams(float(temperature), float(top_p), int(top_k), mixing or NO_MIXING, tuple(stop_ids)),
        samples=samples,
        max_new_tokens=max_new_tokens,
        slots=min(64, max(count, 1)) if slots is None else slots,
        chunk=chunk,
        max_prompt_tokens=max_prompt_tokens or max([1, *map(len, prompts)]),
        sharding=sharding,
        lookahead=lookahead,
    )
    if keys_B is None:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))
    sequences = make_sequences(request, prompts, keys_B, lengths_B)
    if table_VC is None and request.sampling.mixing.uses_table:
        rows_VD = decoder.table_rows(params, config, request.sampling.mixing.table)
        table_VC = neighbor_table(rows_VD, request.sampling.mixing.k, metric=request.sampling.mixing.metric)
    if not inference.is_inference_layout(params):
        params = inference.to_inference_layout(params, config)
    return rollout(params, request, sequences, table_VC=table_VC, stats=stats, progress=progress)


def rollout(
    params: Any,
    request: RolloutRequest,
    sequences: Sequences,
    *,
    table_VC: Any | None = None,
    stats: RolloutStats | None = None,
    progress: Progress | None = None,
) -> Trajectories:
    """Generates the responses of a request.

    Args:
      params: in the inference layout.
      sequences: as `make_sequences` makes them for this request.
      table_VC: neighbour table [V, k]; needed where the request mixes by one, else without use.
      stats: filled in on the way.
      progress: called with the stats after each chunk.

    Returns:
      Trajectories with B = prompts × samples, prompt-major.

    Raises:
      UserError: a table that is missing or of another shape.
    """
    mixing, stats = request.sampling.mixing, RolloutStats() if stats is None else stats
    needed = (request.config.vocab_size, mixing.k)
    found = None if table_VC is None else tuple(table_VC.shape)
    require(
        found == needed or not mixing.uses_table,
        f"the neighbour table has shape {found}; this model and k need {needed}.",
    )
    table_VC = table_VC if mixing.uses_table else None  # an argument more would be another program
    under_way = _Rollout(params, table_VC, Programs.of(request, params), sequences, stats)
    under_way.run(progress)
    return under_way.results


class _Chunk(NamedTuple):
    """A chunk that has been started: the sequence in each slot, whether any was queued, its results."""

    sequence_B: np.ndarray
    queued: bool
    output: ChunkOutput


class _Rollout:
    """A rollout under way: the state of its slots on the device, and what it has generated so far."""

    def __init__(
        self, params: Any, table_VC: Any | None, programs: Programs, sequences: Sequences, stats: RolloutStats
    ) -> None:
        self._params, self._table_VC = params, table_VC
        self._programs, self._sequences, self._stats = programs, sequences, stats
        self._scheduler = SlotScheduler(
            sequences, slots=programs.slots, shards=programs.shards, prefill_rows=programs.prefill_rows
        )
        self._slots: Slots = programs.empty()
        self._prefix: Prefix | None = None  # the last prefill
        self._begun = time.perf_counter()
        request, mixing = programs.request, programs.request.sampling.mixing
        count = len(sequences.keys_B2)
        self.results = Trajectories.empty(
            count, request.max_new_tokens, mixing.candidates, noisy=mixing.noisy
        )
        stats.sequences, stats.slots = count, programs.slots

    def run(self, progress: Progress | None) -> None:
        """Inserts, decodes and collects until every sequence has ended."""
        scheduler, lookahead = self._scheduler, self._programs.request.lookahead
        if lookahead is None:
            lookahead = 0 if self._programs.model.platform == "cpu" else 1
        running: collections.deque[_Chunk] = collections.deque()
        while scheduler.queued or scheduler.active or running:
            self._fill_free_slots(alone=not running)
            if scheduler.active:
                running.append(self._start_chunk())
            if len(running) > (lookahead if scheduler.active else 0):
                self._finish_chunk(running.popleft())
                if progress is not None:
                    progress(self._stats)

    def _fill_free_slots(self, *, alone: bool) -> None:
        """Prefills and inserts until no slot is free or the queue is empty; `alone`: no chunk is running."""
        while True:
            prompts = self._scheduler.next_prefill()
            if prompts is not None:
                self._prefix = self._prefill([self._sequences.prompts[i] for i in prompts], alone=alone)
            insertions = self._scheduler.next_insertions()
            if insertions is None:
                return
            assert self._prefix is not None
            columns = max(self._prefix.cache.columns, self._slots.cache.columns)
            slots = self._programs.resize(self._slots, columns)
            self._slots = self._programs.insert(slots, self._prefix, insertions)

    def _prefill(self, prompts: Sequence[Sequence[int]], *, alone: bool) -> Prefix:
        """A prefill, timed where no chunk is running: after one, blocking would leave the device idle."""
        start = time.perf_counter()
        prefix = self._programs.prefill(self._params, prompts)
        if alone:
            jax.block_until_ready(prefix)
            self._stats.prefill_s += time.perf_counter() - start
        return prefix

    def _start_chunk(self) -> _Chunk:
        """Starts a chunk, and the copy of its results to the host."""
        programs, scheduler, slots = self._programs, self._scheduler, self._slots
        steps = programs.request.chunk
        columns = scheduler.columns_needed(steps)
        while (half := programs.fewer(len(slots.active_B), scheduler.slots_needed, columns)) is not None:
            slots = programs.keep(slots, half, scheduler.keep(half), columns)
        slots = programs.resize(slots, columns)
        self._slots, output = programs.decode(self._params, self._table_VC, slots)
        jax.copy_to_host_async(output)
        return _Chunk(scheduler.advance(steps), scheduler.queued, output)

    def _finish_chunk(self, chunk: _Chunk) -> None:
        """Waits for a chunk's results, records them, and frees the slots of sequences that have ended."""
        ended, tokens = _collect(
            self.results, chunk.sequence_B, jax.device_get(chunk.output), self._sequences.limits_B
        )
        self._scheduler.release(ended)
        stats, steps = self._stats, self._programs.request.chunk
        stats.steps += steps
        stats.rows += steps * len(chunk.sequence_B)
        stats.tokens += tokens
        stats.done += len(ended)
        if chunk.queued:
            stats.queued_steps += steps
            stats.queued_tokens += tokens
        stats.decode_s = time.perf_counter() - self._begun - stats.prefill_s


def _collect(
    results: Trajectories, sequence_B: np.ndarray, output: ChunkOutput, limits_B: np.ndarray
) -> tuple[list[int], int]:
    """Copies a chunk's tokens into the results; returns the sequences that have ended, and the tokens."""
    recorded = results.tokens_BT, results.mixtures, results.mixed_BT, results.logprobs_BT
    generated = output.tokens_TB, output.mixtures, output.mixed_TB, output.logprobs_TB
    pairs = list(zip(jax.tree.leaves(recorded), jax.tree.leaves(generated), strict=True))
    ended, tokens = [], 0
    for slot in np.flatnonzero(sequence_B != FREE):
        sequence, count = sequence_B[slot], int(output.valid_TB[:, slot].sum())
        had_ended = results.ended(sequence, limits_B[sequence])
        start = results.lengths_B[sequence]
        for of_sequence, of_slot in pairs:
            of_sequence[sequence, start : start + count] = of_slot[:count, slot]
        results.lengths_B[sequence] += count
        results.stopped_B[sequence] |= output.stopped_TB[:count, slot].any()
        results.nonfinite_B[sequence] |= output.nonfinite_TB[:, slot].any()
        tokens += count
        if results.ended(sequence, limits_B[sequence]) and not had_ended:
            ended.append(int(sequence))
    return ended, tokens
