"""Trajectories -> packed rows of a fixed number of tokens, in NumPy.

A row holds several sequences (prompt + response), told apart by segment ids. Each position predicts the next
token of its own segment, so a sequence of P prompt and n response tokens takes P + n - 1 positions: the last
response token is a target and never an input. Each token carries its share of the loss (advantages.py), so
neither packing nor microbatches change the mean.

With shared prompts, responses to the same prompt that are packed into the same row share one copy of it: the
first P - 1 prompt tokens are one segment, and each response is a segment with the prompt as its prefix, which
it attends to besides itself. Every response's segment starts with the last prompt token, because that is the
input that predicts the first response token. Positions continue the prompt's. A row with the prompt "a b c",
its responses "u v w" and "x y", and the prompt "d e" with its response "z":

    input      a  b  c  u  v  c  x  .  d  e  .  .    . is padding; a segment starts at a multiple of the
    segment    1  1  2  2  2  3  3  0  4  5  0  0    attention block while the row has positions to spare
    prefix     0  0  1  1  1  1  1  0  0  4  0  0
    position   0  1  2  3  4  2  3  0  0  1  0  0
    target     .  .  u  v  w  x  y  .  .  z  .  .    response_mask is true where there is a target

Must not know how tokens were weighted, how rows are split over devices, or what the loss is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from ngrpo_jax.algo.mixture import Mixture
from ngrpo_jax.errors import UserError
from ngrpo_jax.learner.advantages import Allgather, single_host, token_weights
from ngrpo_jax.learner.bins import first_fit, first_fit_groups
from ngrpo_jax.model.attention import BLOCK
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings

Array = Any  # np.ndarray while rows are packed, jax.Array once they are on the devices


class Batch(NamedTuple):
    """B responses with their advantages: the data of one or more optimiser steps, on this host.

    Attributes:
      prompts: token ids of each response's prompt (repeated within a group).
      trajectories: the responses.
      advantages_B: float32.
      included_B: bool, the responses that take part in the update; None for all.
    """

    prompts: Sequence[Sequence[int]]
    trajectories: Trajectories
    advantages_B: np.ndarray
    included_B: np.ndarray | None = None

    def part(self, start: int, stop: int) -> Self:
        """Responses start..stop."""
        return type(self)(
            self.prompts[start:stop],
            self.trajectories.part(start, stop),
            self.advantages_B[start:stop],
            None if self.included_B is None else self.included_B[start:stop],
        )


class RowLayout(NamedTuple):
    """The shape of packed rows.

    Attributes:
      row_tokens: T, positions of a row.
      rows: rows of a microbatch, on all devices of this host.
      share_prompts: whether equal prompts within a row are packed once.
    """

    row_tokens: int
    rows: int
    share_prompts: bool = False


class Rows(NamedTuple):
    """R packed rows of T positions.

    Attributes:
      inputs: mixtures [R, T, C]; ordinary tokens are one-hot.
      positions_RT: int32, position within the sequence, for the rotary angles.
      segment_ids_RT: int32, 1.. rising along each row; 0 is padding, between segments and at the end.
      prefix_ids_RT: int32, the segment that a token attends to besides its own (a shared prompt); 0 for none.
      targets_RT: int32, the token that follows; 0 outside of `response_mask_RT`.
      weight_RT: float32, the token's share of the loss; 0 at prompts and padding.
      response_mask_RT: bool, whether the target is a response token (whatever its weight).
      advantages_RT: float32, the sequence's advantage; 0 in the segment of a shared prompt.
      sampler_logprobs_RT: float32, the target's log-probability under the sampler.
    """

    inputs: Mixture
    positions_RT: Array
    segment_ids_RT: Array
    prefix_ids_RT: Array
    targets_RT: Array
    weight_RT: Array
    response_mask_RT: Array
    advantages_RT: Array
    sampler_logprobs_RT: Array


def pack(batch: Batch, weight_BT: np.ndarray, layout: RowLayout) -> Rows:
    """Packs sequences into as few rows as first-fit decreasing finds; empty rows fill up the last microbatch.

    Args:
      weight_BT: share of the loss of each response token.

    Returns:
      rows whose number is a multiple of `layout.rows`.

    Raises:
      UserError: a sequence longer than a row.
    """
    prefixes = [len(prompt) - 1 for prompt in batch.prompts]
    counts = [int(n) for n in batch.trajectories.lengths_B]
    lengths = [prefix + count for prefix, count in zip(prefixes, counts, strict=True)]
    if max(lengths) > layout.row_tokens:
        raise UserError(
            f"sequence {int(np.argmax(lengths))} takes {max(lengths)} positions, more than a row of "
            f"train.row_tokens = {layout.row_tokens}."
        )
    groups = None
    if layout.share_prompts:
        known: dict[tuple[int, ...], int] = {}
        groups = [known.setdefault(tuple(prompt), len(known)) for prompt in batch.prompts]
        bins = first_fit_groups(groups, prefixes, counts, layout.row_tokens)
    else:
        bins = first_fit(lengths, layout.row_tokens)
    count = -(-len(bins) // layout.rows) * layout.rows
    rows = empty_rows(count, layout.row_tokens, batch.trajectories.mixtures)
    for row, members in enumerate(bins):
        segments = _segments(members, groups, prefixes, counts)
        starts = _starts([segment.tokens for segment in segments], layout.row_tokens)
        for number, (segment, start) in enumerate(zip(segments, starts, strict=True), 1):
            _write(rows, row, start, number, segment, batch, weight_BT)
    return rows


class _Segment(NamedTuple):
    """Consecutive positions of a row: some tokens of a sequence's prompt, then its response or nothing."""

    sequence: int
    first: int  # position of the first token within the sequence
    prompt: int  # tokens of the prompt
    response: int  # tokens of the response, of which the last is a target alone
    prefix: int  # number of the segment that it attends to besides itself, 0 for none

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
    shared, group = 0, None
    for i in members:
        if groups[i] != group:
            segments.append(_Segment(i, 0, prefixes[i], 0, 0))
            shared, group = len(segments), groups[i]
        segments.append(_Segment(i, prefixes[i], 1, counts[i], shared))
    return segments


def _starts(lengths: Sequence[int], row_tokens: int) -> list[int]:
    """First position of each segment: the next multiple of the attention block while unused positions remain.

    A segment that starts in the middle of a block overlaps one block more than it needs, and blockwise
    attention computes every pair of blocks that share a segment, even if only a few of their tokens do.
    """
    unused, end = row_tokens - sum(lengths), 0
    starts = []
    for length in lengths:
        gap = -end % BLOCK
        gap = gap if gap <= unused else 0
        starts.append(end + gap)
        unused, end = unused - gap, end + gap + length
    return starts


def _write(
    rows: Rows, row: int, start: int, number: int, segment: _Segment, batch: Batch, weight_BT: np.ndarray
) -> None:
    """Writes a segment into a row in place; the inputs of the response are the mixtures of the rollout."""
    stop, prompt_stop = start + segment.tokens, start + segment.prompt
    sequence, count = segment.sequence, segment.response
    rows.segment_ids_RT[row, start:stop] = number
    rows.prefix_ids_RT[row, start:stop] = segment.prefix
    rows.positions_RT[row, start:stop] = segment.first + np.arange(segment.tokens)
    prompt = batch.prompts[sequence][segment.first : segment.first + segment.prompt]
    rows.inputs.ids[row, start:prompt_stop, 0] = prompt
    if not count:
        return
    trajectories = batch.trajectories

    def replay(row_leaf: np.ndarray, leaf: np.ndarray) -> None:
        row_leaf[row, prompt_stop:stop] = leaf[sequence, : count - 1]

    jax.tree.map(replay, rows.inputs, trajectories.mixtures)
    predicting = slice(stop - count, stop)  # from the last prompt token on
    rows.advantages_RT[row, start:stop] = batch.advantages_B[sequence]
    rows.targets_RT[row, predicting] = trajectories.response(sequence)
    rows.response_mask_RT[row, predicting] = True
    rows.weight_RT[row, predicting] = weight_BT[sequence, :count]
    rows.sampler_logprobs_RT[row, predicting] = trajectories.logprobs_BT[sequence, :count]


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
        response_mask_RT=zeros(bool),
        advantages_RT=zeros(np.float32),
        sampler_logprobs_RT=zeros(np.float32),
    )


def mini_batches(
    batch: Batch,
    objective: ObjectiveSettings,
    layout: RowLayout,
    *,
    count: int,
    allgather: Allgather = single_host,
) -> list[list[Rows]]:
    """A rollout batch as `count` mini-batches (optimiser steps), each a list of microbatches of rows.

    Every host packs its share of each mini-batch. All hosts return equally many microbatches of it: a host
    with fewer rows adds empty ones.

    Args:
      batch: this host's responses; `count` divides their number.
      objective: how tokens are weighted (`aggregate`, `loss_on_mixed`).
    """
    size = len(batch.prompts) // count
    batches = []
    for start in range(0, len(batch.prompts), size):
        part = batch.part(start, start + size)
        weight_BT = token_weights(part.trajectories, objective, part.included_B, allgather)
        packed = pack(part, weight_BT, layout)
        rows = [
            slice_rows(packed, first, layout.rows) for first in range(0, len(packed.targets_RT), layout.rows)
        ]
        missing = max(allgather(len(rows))) - len(rows)
        batches.append(rows + [empty_rows(layout.rows, layout.row_tokens, packed.inputs)] * missing)
    return batches


def slice_rows(rows: Rows, start: int, count: int) -> Rows:
    """Rows start..start + count."""
    return jax.tree.map(lambda leaf: leaf[start : start + count], rows)


def fill_fraction(batches: Sequence[Sequence[Rows]], allgather: Allgather = single_host) -> float:
    """Share of the computed positions that hold a token, over all hosts."""
    ids = [rows.segment_ids_RT for microbatches in batches for rows in microbatches]
    counts = allgather([sum(int((x > 0).sum()) for x in ids), sum(x.size for x in ids)])
    filled, computed = map(sum, zip(*counts, strict=True))
    return filled / computed
