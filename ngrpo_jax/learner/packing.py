"""Trajectories -> packed rows of a fixed number of tokens, in NumPy.

A row holds several sequences (prompt + response) end to end, told apart by segment ids. Each position
predicts the next token of its own segment, so a sequence of P prompt and n response tokens takes P + n - 1
positions: the last response token is a target and never an input. Every token carries its share of the loss
(credit.py), so that neither packing nor microbatches bias it.

With shared prompts, responses to one prompt that lie in one row have it once: the P - 1 first prompt tokens
are a segment, and each response is another that sees it as its prefix. The last prompt token, which predicts
the first of the response, starts every response's segment, and positions go on from the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ngrpo_jax.algo.mixture import Mixture
from ngrpo_jax.learner.advantages import Gather, one_host, token_weights
from ngrpo_jax.learner.bins import first_fit, first_fit_groups
from ngrpo_jax.model.attention import BLOCK
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings

Array = Any  # np.ndarray while rows are packed, jax.Array once they are on the devices


class Rows(NamedTuple):
    """R packed rows of T positions.

    Attributes:
      inputs: mixtures [R, T, C]; ordinary tokens are one-hot.
      positions_RT: int32, position within the segment.
      segment_ids_RT: int32, 1.. rising along each row; 0 is padding, between them and at the end.
      prefix_ids_RT: int32, the segment that a token sees besides its own: a shared prompt; 0 for none.
      targets_RT: int32, the token that follows; 0 where weight is 0.
      weight_RT: float32, the token's share of the loss; 0 at prompts and padding.
      response_RT: bool, whether the target is a response token (whatever its weight).
      advantages_RT: float32, the sequence's advantage; 0 at a shared prompt, which is of several.
      sampler_logprobs_RT: float32, log-probability of the target when the sampler wrote it.
    """

    inputs: Mixture
    positions_RT: Array
    segment_ids_RT: Array
    prefix_ids_RT: Array
    targets_RT: Array
    weight_RT: Array
    response_RT: Array
    advantages_RT: Array
    sampler_logprobs_RT: Array


def pack(
    prompts: Sequence[Sequence[int]],
    trajectories: Trajectories,
    advantages_B: np.ndarray,
    weight_BT: np.ndarray,
    *,
    row_tokens: int,
    rows_multiple: int,
    share_prompts: bool = False,
) -> Rows:
    """Packs sequences into as few rows as first-fit decreasing finds; empty rows fill up to a multiple.

    Args:
      prompts: token ids of each sequence's prompt, one a sequence (repeated within a group).
      trajectories: the B responses.
      advantages_B: one a sequence.
      weight_BT: share of the loss of each response token.
      row_tokens: T.
      rows_multiple: R becomes a multiple of it (rows of a microbatch on all devices).
      share_prompts: whether equal prompts that stand in one row are laid out once.

    Raises:
      ValueError: a sequence longer than a row.
    """
    prefixes = [len(prompt) - 1 for prompt in prompts]
    counts = [int(n) for n in trajectories.lengths_B]
    lengths = [prefix + count for prefix, count in zip(prefixes, counts, strict=True)]
    if max(lengths) > row_tokens:
        raise ValueError(
            f"sequence {int(np.argmax(lengths))} takes {max(lengths)} positions, more than a row of "
            f"train.row_tokens = {row_tokens}."
        )
    groups = None
    if share_prompts:
        known: dict[tuple[int, ...], int] = {}
        groups = [known.setdefault(tuple(prompt), len(known)) for prompt in prompts]
        bins = first_fit_groups(groups, prefixes, counts, row_tokens)
    else:
        bins = first_fit(lengths, row_tokens)
    rows = empty_rows(-(-len(bins) // rows_multiple) * rows_multiple, row_tokens, trajectories.mixtures)
    for row, members in enumerate(bins):
        segments = _segments(members, groups, prefixes, counts)
        starts = _starts([segment.tokens for segment in segments], row_tokens)
        for number, (segment, start) in enumerate(zip(segments, starts, strict=True), 1):
            here = slice(start, start + segment.tokens)
            _write_tokens(rows, row, here, segment, prompts[segment.sequence], trajectories)
            rows.segment_ids_RT[row, here] = number
            rows.prefix_ids_RT[row, here] = segment.prefix
            rows.advantages_RT[row, here] = advantages_B[segment.sequence] if segment.response else 0.0
            answer = slice(here.stop - segment.response, here.stop)
            rows.weight_RT[row, answer] = weight_BT[segment.sequence, : segment.response]
    return rows


class _Segment(NamedTuple):
    """Tokens of a sequence that stand together in a row: some of its prompt, then its response or nothing."""

    sequence: int
    first: int  # place of the first token in the sequence
    prompt: int  # tokens of the prompt
    response: int  # tokens of the response, of which the last is a target alone
    prefix: int  # number of the segment that it sees besides itself, 0 for none

    @property
    def tokens(self) -> int:
        """Positions that it takes."""
        return self.prompt + max(self.response - 1, 0)


def _segments(
    members: Sequence[int], groups: Sequence[int] | None, prefixes: Sequence[int], counts: Sequence[int]
) -> list[_Segment]:
    """The segments of a row of these sequences; with `groups`, those of one group share their prompt."""
    if groups is None:
        return [_Segment(i, 0, prefixes[i] + 1, counts[i], 0) for i in members]
    segments: list[_Segment] = []
    shared = 0
    for place, i in enumerate(members):
        if place == 0 or groups[i] != groups[members[place - 1]]:
            segments.append(_Segment(i, 0, prefixes[i], 0, 0))
            shared = len(segments)
        segments.append(_Segment(i, prefixes[i], 1, counts[i], shared))
    return segments


def _starts(lengths: Sequence[int], row_tokens: int) -> list[int]:
    """Where the segments of a row start: with a block of attention as long as the row has room for the gaps.

    Whoever starts within a block makes it and its neighbours pairs of blocks in which few see anybody.
    """
    room, end = row_tokens - sum(lengths), 0
    starts = []
    for length in lengths:
        gap = -end % BLOCK
        gap = gap if gap <= room else 0
        starts.append(end + gap)
        room, end = room - gap, end + gap + length
    return starts


def _write_tokens(
    rows: Rows, row: int, here: slice, segment: _Segment, prompt: Sequence[int], trajectories: Trajectories
) -> None:
    """Lays a segment's inputs and targets into a row: each input of the response as the rollout had it."""
    rows.positions_RT[row, here] = segment.first + np.arange(segment.tokens)
    of_prompt = slice(here.start, here.start + segment.prompt)
    rows.inputs.ids[row, of_prompt, 0] = prompt[segment.first : segment.first + segment.prompt]
    if not segment.response:
        return
    sequence, count = segment.sequence, segment.response

    def replay(row_leaf: np.ndarray, leaf: np.ndarray) -> None:
        row_leaf[row, of_prompt.stop : here.stop] = leaf[sequence, : count - 1]

    jax.tree.map(replay, rows.inputs, trajectories.mixtures)
    answer = slice(here.stop - count, here.stop)  # from the prompt's last token on
    rows.targets_RT[row, answer] = trajectories.response(sequence)
    rows.response_RT[row, answer] = True
    rows.sampler_logprobs_RT[row, answer] = trajectories.logprobs_BT[sequence, :count]


def empty_rows(count: int, length: int, like: Mixture) -> Rows:
    """Rows of padding: segment 0, weight 0, one-hot 0; mixtures have the leaves of `like`, [B, T, ...]."""

    def zeros(dtype: Any) -> np.ndarray:
        return np.zeros((count, length), dtype)

    inputs = jax.tree.map(lambda leaf: np.zeros((count, length, *leaf.shape[2:]), leaf.dtype), like)
    inputs.weights[..., 0] = 1.0
    return Rows(
        inputs=inputs,
        positions_RT=zeros(np.int32),
        segment_ids_RT=zeros(np.int32),
        prefix_ids_RT=zeros(np.int32),
        targets_RT=zeros(np.int32),
        weight_RT=zeros(np.float32),
        response_RT=zeros(bool),
        advantages_RT=zeros(np.float32),
        sampler_logprobs_RT=zeros(np.float32),
    )


def mini_batches(
    prompts: Sequence[Sequence[int]],
    trajectories: Trajectories,
    advantages_B: np.ndarray,
    objective: ObjectiveSettings,
    *,
    count: int,
    row_tokens: int,
    rows: int,
    max_new_tokens: int,
    counted_B: np.ndarray | None = None,
    share_prompts: bool = False,
    gather: Gather = one_host,
) -> list[list[Rows]]:
    """A rollout batch as `count` mini-batches (optimiser steps), each a list of microbatches of `rows` rows.

    Every host has its share of each mini-batch, and as many microbatches of it as the others: those that it
    has no rows for are empty.

    Args:
      prompts: one a sequence, in the order of the trajectories; all are this host's.
      objective: how tokens are weighted (`aggregate`, `loss_on_mixed`).
      count: divides the number of sequences.
      row_tokens: T of the rows.
      rows: rows of a microbatch, over all devices of this host.
      max_new_tokens: the constant of aggregate "constant".
      counted_B: bool, the sequences that take part in the update; all by default.
      share_prompts: as for `pack`.
      gather: asks the other hosts.
    """
    size = len(prompts) // count
    counted_B = np.ones(len(prompts), bool) if counted_B is None else counted_B
    batches = []
    for start in range(0, len(prompts), size):
        part = trajectories.part(start, start + size)
        weight_BT = token_weights(
            part.lengths_B,
            part.mixed_BT,
            aggregate=objective.aggregate,
            loss_on_mixed=objective.loss_on_mixed,
            max_new_tokens=max_new_tokens,
            counted_B=counted_B[start : start + size],
            gather=gather,
        )
        packed = pack(
            prompts[start : start + size],
            part,
            advantages_B[start : start + size],
            weight_BT,
            row_tokens=row_tokens,
            rows_multiple=rows,
            share_prompts=share_prompts,
        )
        batch = [take(packed, first, rows) for first in range(0, len(packed.targets_RT), rows)]
        longest = max(gather(len(batch)))
        batches.append(batch + [empty_rows(rows, row_tokens, packed.inputs)] * (longest - len(batch)))
    return batches


def take(rows: Rows, start: int, count: int) -> Rows:
    """Rows start..start + count."""
    return jax.tree.map(lambda leaf: leaf[start : start + count], rows)


def fill(batches: Sequence[Sequence[Rows]], gather: Gather = one_host) -> float:
    """Share of the computed positions that hold a token, over all hosts."""
    rows = [part.segment_ids_RT for batch in batches for part in batch]
    counts = gather([sum(int((ids > 0).sum()) for ids in rows), sum(ids.size for ids in rows)])
    filled, computed = map(sum, zip(*counts, strict=True))
    return filled / computed
