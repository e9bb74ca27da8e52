"""Trajectories -> packed rows of a fixed number of tokens, in NumPy.

A row holds several sequences (prompt + response) end to end, told apart by segment ids. Each position
predicts the next token of its own segment, so a sequence of P prompt and n response tokens takes P + n - 1
positions: the last response token is a target and never an input. Every token carries its share of the loss,
computed here from the counts of the whole optimiser step, so that neither packing nor microbatches bias it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ngrpo_jax.algo.mixture import Mixture
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings

Array = Any  # np.ndarray while rows are packed, jax.Array once they are on the devices


class Rows(NamedTuple):
    """R packed rows of T positions.

    Attributes:
      inputs: mixtures [R, T, C]; ordinary tokens are one-hot.
      positions_RT: int32, position within the segment.
      segment_ids_RT: int32, 1.. within each row; 0 is padding.
      targets_RT: int32, the token that follows; 0 where weight is 0.
      weight_RT: float32, the token's share of the loss; 0 at prompts and padding.
      response_RT: bool, whether the target is a response token (whatever its weight).
      advantages_RT: float32, the sequence's advantage.
      behaviour_RT: float32, log-probability of the target when the sampler wrote it.
    """

    inputs: Mixture
    positions_RT: Array
    segment_ids_RT: Array
    targets_RT: Array
    weight_RT: Array
    response_RT: Array
    advantages_RT: Array
    behaviour_RT: Array


Gather = Callable[[Any], list[Any]]  # what every host says (by its number), given what this one says


def one_host(value: Any) -> list[Any]:
    """The `Gather` of a run on one host."""
    return [value]


def token_weights(
    lengths_B: np.ndarray,
    mixed_BT: np.ndarray,
    *,
    aggregate: str,
    loss_on_mixed: bool,
    max_new_tokens: int,
    gather: Gather = one_host,
) -> np.ndarray:
    """Each response token's share of an optimiser step's loss, float32 [B, T].

    Args:
      lengths_B: response lengths of this host's sequences of the step.
      mixed_BT: positions whose input was mixed.
      aggregate: "sequence": mean over each response, then over responses (13); "token": mean over all
        tokens; "constant": sum over tokens, divided by responses × max_new_tokens.
      loss_on_mixed: false gives mixed positions weight 0 and leaves the other weights as they are.
      gather: asks the other hosts of the step for their counts.
    """
    length = mixed_BT.shape[1]
    count, tokens = map(sum, zip(*gather([len(lengths_B), int(lengths_B.sum())]), strict=True))
    real_BT = np.arange(length) < lengths_B[:, None]
    share_B = {
        "sequence": 1.0 / (count * lengths_B),
        "token": np.full(len(lengths_B), 1.0 / tokens),
        "constant": np.full(len(lengths_B), 1.0 / (count * max_new_tokens)),
    }[aggregate]
    weight_BT = np.where(real_BT, share_B[:, None], 0.0)
    if not loss_on_mixed:
        weight_BT = np.where(mixed_BT, 0.0, weight_BT)
    return weight_BT.astype(np.float32)


def pack(
    prompts: Sequence[Sequence[int]],
    trajectories: Trajectories,
    advantages_B: np.ndarray,
    weight_BT: np.ndarray,
    *,
    row_tokens: int,
    rows_multiple: int,
) -> Rows:
    """Packs sequences into as few rows as first-fit decreasing finds; empty rows fill up to a multiple.

    Args:
      prompts: token ids of each sequence's prompt, one a sequence (repeated within a group).
      trajectories: the B responses.
      advantages_B: one a sequence.
      weight_BT: share of the loss of each response token.
      row_tokens: T.
      rows_multiple: R becomes a multiple of it (rows of a microbatch on all devices).

    Raises:
      ValueError: a sequence longer than a row.
    """
    lengths = [len(prompt) + int(n) - 1 for prompt, n in zip(prompts, trajectories.lengths_B, strict=True)]
    if max(lengths) > row_tokens:
        raise ValueError(
            f"sequence {int(np.argmax(lengths))} takes {max(lengths)} positions, more than a row of "
            f"train.row_tokens = {row_tokens}."
        )
    bins = first_fit(lengths, row_tokens)
    rows = empty_rows(
        -(-len(bins) // rows_multiple) * rows_multiple, row_tokens, trajectories.mixtures.ids.shape[-1]
    )
    for row, members in enumerate(bins):
        start = 0
        for segment, sequence in enumerate(members, start=1):
            stop = start + lengths[sequence]
            _write(rows, row, start, stop, segment, prompts[sequence], trajectories, sequence)
            answer = slice(stop - int(trajectories.lengths_B[sequence]), stop)
            rows.weight_RT[row, answer] = weight_BT[sequence, : trajectories.lengths_B[sequence]]
            rows.advantages_RT[row, start:stop] = advantages_B[sequence]
            start = stop
    return rows


def _write(rows, row, start, stop, segment, prompt, trajectories, sequence) -> None:
    """Lays one sequence into positions start..stop of a row."""
    count = int(trajectories.lengths_B[sequence])
    first = stop - count  # the last prompt position: it predicts the first response token
    rows.inputs.ids[row, start : start + len(prompt), 0] = prompt
    rows.inputs.ids[row, first + 1 : stop] = trajectories.mixtures.ids[sequence, : count - 1]
    rows.inputs.weights[row, first + 1 : stop] = trajectories.mixtures.weights[sequence, : count - 1]
    rows.positions_RT[row, start:stop] = np.arange(stop - start)
    rows.segment_ids_RT[row, start:stop] = segment
    rows.targets_RT[row, first:stop] = trajectories.response(sequence)
    rows.response_RT[row, first:stop] = True
    rows.behaviour_RT[row, first:stop] = trajectories.logprobs_BT[sequence, :count]


def empty_rows(count: int, length: int, candidates: int) -> Rows:
    """Rows of padding: segment 0, weight 0, one-hot 0."""

    def zeros(dtype):
        return np.zeros((count, length), dtype)

    weights_RTC = np.zeros((count, length, candidates), np.float32)
    weights_RTC[..., 0] = 1.0
    return Rows(
        inputs=Mixture(np.zeros((count, length, candidates), np.int32), weights_RTC),
        positions_RT=zeros(np.int32),
        segment_ids_RT=zeros(np.int32),
        targets_RT=zeros(np.int32),
        weight_RT=zeros(np.float32),
        response_RT=zeros(bool),
        advantages_RT=zeros(np.float32),
        behaviour_RT=zeros(np.float32),
    )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` grouped so that no group's sum exceeds `capacity`."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number, left in enumerate(room):
            if lengths[index] <= left:
                bins[number].append(index)
                room[number] -= lengths[index]
                break
        else:
            bins.append([index])
            room.append(capacity - lengths[index])
    return bins


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
      gather: asks the other hosts.
    """
    size = len(prompts) // count
    batches = []
    for start in range(0, len(prompts), size):
        part = trajectories.part(start, start + size)
        weight_BT = token_weights(
            part.lengths_B,
            part.mixed_BT,
            aggregate=objective.aggregate,
            loss_on_mixed=objective.loss_on_mixed,
            max_new_tokens=max_new_tokens,
            gather=gather,
        )
        packed = pack(
            prompts[start : start + size],
            part,
            advantages_B[start : start + size],
            weight_BT,
            row_tokens=row_tokens,
            rows_multiple=rows,
        )
        batch = [take(packed, first, rows) for first in range(0, len(packed.targets_RT), rows)]
        longest = max(gather(len(batch)))
        candidates = packed.inputs.ids.shape[-1]
        batches.append(batch + [empty_rows(rows, row_tokens, candidates)] * (longest - len(batch)))
    return batches


def take(rows: Rows, start: int, count: int) -> Rows:
    """Rows start..start + count."""
    cut = slice(start, start + count)
    inputs = Mixture(rows.inputs.ids[cut], rows.inputs.weights[cut])
    return Rows(inputs, *(leaf[cut] for leaf in rows[1:]))


def fill(batches: Sequence[Sequence[Rows]], gather: Gather = one_host) -> float:
    """Share of the computed positions that hold a token, over all hosts."""
    rows = [part.segment_ids_RT for batch in batches for part in batch]
    counts = gather([sum(int((ids > 0).sum()) for ids in rows), sum(ids.size for ids in rows)])
    filled, computed = map(sum, zip(*counts, strict=True))
    return filled / computed
