"""The scheduler: prompts in, trajectories out, over a fixed number of slots.

Sequences wait in order; whenever slots are free they are filled from a shared prefill of the next prompts,
then all slots decode one chunk, then the finished ones are handed back. Where host and device run side by
side, the flags of a chunk are read while the next one runs. Each sequence brings its own key, so that none of
this changes what it writes. Knows token ids only: no tokenizer, no rewards, no learner.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.model import cache as kv
from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import decode
from ngrpo_jax.rollout.checks import check_arguments
from ngrpo_jax.rollout.compiling import Plan, Shapes, decoded, empty_slots, prefilled, shapes_of
from ngrpo_jax.rollout.scheduler import Seating, smallest
from ngrpo_jax.rollout.trajectory import Trajectories

NO_MIXING = Mixing(strategy="none")


@dataclasses.dataclass
class Stats:
    """What a rollout has done so far; `generate` fills it in as it goes.

    A step runs in every slot, whether somebody sits there or not, so steps × slots is the work that was done
    and tokens the work that was of use. `waiting_` counts the same over the chunks at whose start sequences
    waited. Times are wall seconds: prefill_s of the prefills beside which no chunk was under way, decode_s of
    everything else.
    """

    sequences: int = 0
    done: int = 0
    slots: int = 0
    steps: int = 0
    tokens: int = 0
    waiting_steps: int = 0
    waiting_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows that wrote a token."""
        return self.tokens / (self.steps * self.slots) if self.steps else 0.0

    @property
    def waiting_occupancy(self) -> float:
        """The same while sequences waited for a slot; 0 where none ever did."""
        return self.waiting_tokens / (self.waiting_steps * self.slots) if self.waiting_steps else 0.0


Progress = Callable[[Stats], None]
Prefix = tuple[jax.Array, kv.KVCache]  # a prefill's hidden states [P, D], and its keys and values


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
    stats: Stats | None = None,
    progress: Progress | None = None,
) -> Trajectories:
    """Draws `samples` responses to each prompt.

    Args:
      params: parameters as `model.hf.load` gives them, or as `inference.lay_out` has made of them.
      config: the model's; `config.dtype` is the dtype of matrix products and of the cache.
      prompts: token ids, ragged, none empty.
      samples: responses a prompt.
      max_new_tokens: bound on a response; the T of the result.
      temperature: divides the logits; 0 is greedy.
      top_p: nucleus, of the law that top_k has left and renormalised.
      top_k: 0 for all tokens.
      mixing: what is done to inputs; None for nothing.
      table_VC: neighbour table [V, k]; when missing and needed, built over all rows of the input embedding
        (or of the head, by `mixing.table`).
      stop_ids: tokens that end a response; taken as given, may be empty.
      seed: of the default keys, fold_in(key(seed), i) for sequence i.
      keys_B: one key a sequence (typed keys or their uint32 data) instead of those.
      lengths_B: a bound of its own for each response, from 1 to max_new_tokens.
      slots: sequences decoded side by side; None: 64, or as many as there are sequences.
      chunk: decode steps between two refills.
      max_prompt_tokens: what the cache has room for; None: the longest of these prompts. Given, nothing
        compiles anew for other prompts.
      sharding: of arrays whose leading dimension is the slots; params must live on the same devices.
      lookahead: chunks started before the flags of the last but so many are read; None: 0 on CPU, else 1.
      stats: filled in on the way.
      progress: called with the stats after each chunk.

    Returns:
      Trajectories with B = prompts × samples, prompt-major.

    Raises:
      ValueError: an argument that cannot be right, by name.
    """
    sampler = decode.Sampler(
        float(temperature), float(top_p), int(top_k), mixing or NO_MIXING, tuple(stop_ids)
    )
    count = len(prompts) * samples
    slots = min(64, count) if slots is None else slots
    limits_B = np.full(count, max_new_tokens) if lengths_B is None else np.asarray(lengths_B)
    check_arguments(
        prompts, config, sampler, samples, max_new_tokens, limits_B, slots, chunk, max_prompt_tokens, table_VC
    )
    keys_B2 = _key_data(keys_B, seed, count)
    table_VC = _table(params, config, sampler, table_VC)
    if not inference.is_laid_out(params):
        params = inference.lay_out(params, config)
    longest = max_prompt_tokens or max(map(len, prompts))
    shapes = shapes_of(
        Plan(config, sampler, samples, max_new_tokens, slots, chunk, longest, sharding), params
    )
    stats = Stats() if stats is None else stats
    stats.sequences, stats.slots = count, shapes.slots
    seating = Seating(
        np.array([len(prompt) for prompt in prompts]),
        limits_B,
        samples,
        keys_B2,
        slots=shapes.slots,
        shards=shapes.shards,
        prompts=shapes.prompts,
    )
    results = Trajectories.empty(count, max_new_tokens, sampler.mixing.candidates, noisy=sampler.mixing.noisy)
    if lookahead is None:
        lookahead = 0 if jax.default_backend() == "cpu" else 1
    _run(params, table_VC, prompts, shapes, seating, results, limits_B, lookahead, stats, progress)
    return results


def _run(
    params: Any,
    table_VC: Any | None,
    prompts: Sequence[Sequence[int]],
    shapes: Shapes,
    seating: Seating,
    results: Trajectories,
    limits_B: np.ndarray,
    lookahead: int,
    stats: Stats,
    progress: Progress | None,
) -> None:
    """Refills, decodes and collects until every sequence has ended."""
    state = empty_slots(shapes)
    running: collections.deque = collections.deque()  # (who sat where, whether any waited, what was written)
    prefix, begun = None, time.perf_counter()
    while seating.waiting or seating.seated or running:
        if seating.waiting:
            state, prefix = _refill(params, prompts, shapes, seating, state, prefix, stats, alone=not running)
        if seating.seated:
            state = _fitted(state, seating.columns_needed(shapes.chunk), shapes)
            state, written = decoded(params, table_VC, state, shapes)
            jax.tree.map(lambda leaf: leaf.copy_to_host_async(), written)
            running.append((seating.advance(shapes.chunk), seating.waiting, written))
        if len(running) > (lookahead if seating.seated else 0):
            who_B, waited, written = running.popleft()
            ended, tokens = _collect(results, who_B, jax.device_get(written), limits_B)
            seating.release(ended)
            stats.steps += shapes.chunk
            stats.tokens += tokens
            stats.done += len(ended)
            if waited:
                stats.waiting_steps += shapes.chunk
                stats.waiting_tokens += tokens
            stats.decode_s = time.perf_counter() - begun - stats.prefill_s
            if progress is not None:
                progress(stats)


def _refill(
    params: Any,
    prompts: Sequence[Sequence[int]],
    shapes: Shapes,
    seating: Seating,
    state: decode.Slots,
    prefix: Prefix | None,
    stats: Stats,
    *,
    alone: bool,
) -> tuple[decode.Slots, Prefix | None]:
    """Prefills and seats until no slot is free or nobody waits: (slots, the last prefill).

    `alone`: no chunk is under way. Beside one, waiting here would leave the device idle after it.
    """
    while True:
        wanted = seating.wants_prefill()
        if wanted is not None:
            start = time.perf_counter()
            prefix = prefilled(params, [prompts[i] for i in wanted], shapes)
            if alone:
                jax.block_until_ready(prefix)
                stats.prefill_s += time.perf_counter() - start
        seats = seating.seat()
        if seats is None or prefix is None:
            return state, prefix
        hidden_PD, cache = prefix
        if state.cache.columns < cache.columns:
            state = _fitted(state, cache.columns, shapes)
        state = decode.fill(state, hidden_PD, cache, seats, placement=shapes.placement)


def _fitted(state: decode.Slots, need: int, shapes: Shapes) -> decode.Slots:
    """The slots with a cache of at least so many columns, reached by one size after the other.

    So the stretches to compile are those between neighbouring sizes. Where the cache shrinks, it keeps one
    size more than is needed, lest it go back and forth at every refill.
    """
    at, wanted = (shapes.sizes.index(size) for size in (state.cache.columns, smallest(shapes.sizes, need)))
    while at < wanted or at > wanted + 1:
        at += 1 if at < wanted else -1
        state = decode.stretch(state, shapes.sizes[at])
    return state


def _collect(
    results: Trajectories, who_B: np.ndarray, written: decode.Written, limits_B: np.ndarray
) -> tuple[list[int], int]:
    """Copies a chunk's tokens into the results; returns the sequences that have ended and the tokens."""
    ended, tokens = [], 0
    kept, fresh = jax.tree.leaves(results.mixtures), jax.tree.leaves(written.mixtures)
    for slot in np.flatnonzero(who_B >= 0):
        sequence, count = who_B[slot], int(written.valid_TB[:, slot].sum())
        start = results.lengths_B[sequence]
        here, there = (sequence, slice(start, start + count)), (slice(count), slot)
        results.tokens_BT[here] = written.tokens_TB[there]
        results.mixed_BT[here] = written.mixed_TB[there]
        results.logprobs_BT[here] = written.logprobs_TB[there]
        for old, new in zip(kept, fresh, strict=True):
            old[here] = new[there]
        was_over = results.over(sequence, limits_B[sequence])
        results.lengths_B[sequence] += count
        results.stopped_B[sequence] |= written.stopped_TB[there].any()
        results.failed_B[sequence] |= written.failed_TB[:, slot].any()
        tokens += count
        if results.over(sequence, limits_B[sequence]) and not was_over:
            ended.append(int(sequence))
    return ended, tokens


def _table(params: Any, config: ModelConfig, sampler: decode.Sampler, table_VC: Any | None) -> Any | None:
    """The table given, or one over all rows where a strategy needs it and none is given."""
    if not sampler.mixing.uses_table or table_VC is not None:
        return table_VC if sampler.mixing.uses_table else None
    if inference.is_laid_out(params):
        rows_VD = inference.table_rows(params, sampler.mixing.table)
    else:
        rows_VD = decoder.table_rows(params, config, sampler.mixing.table)
    return neighbor_table(rows_VD, sampler.mixing.k, metric=sampler.mixing.metric)


def _key_data(keys_B: Any | None, seed: int, count: int) -> np.ndarray:
    """uint32 [count, 2]: the given keys' data, or fold_in(key(seed), i)."""
    if keys_B is None:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))
    if jax.dtypes.issubdtype(getattr(keys_B, "dtype", None), jax.dtypes.prng_key):
        keys_B = jax.random.key_data(keys_B)
    keys_B2 = np.asarray(keys_B)
    if keys_B2.shape != (count, 2) or keys_B2.dtype != np.uint32:
        raise ValueError(
            f"keys_B must hold one key for each of the {count} sequences; got shape {keys_B2.shape}."
        )
    return keys_B2
