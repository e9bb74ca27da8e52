"""A step's rows of samples.jsonl: whole groups of responses, with the mixture of each mixed token.

Owns which groups are kept, the bound on their bytes, and the format of a row. Must not know how a row is
shown.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ngrpo_jax.evaluation.cosines import mixed_cosines
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.run.metrics import Rollout
from ngrpo_jax.setup.policy import Policy
from ngrpo_jax.tasks import prompts

GROUPS = 2  # of a step
STEP_BYTES = 160_000  # of a step's responses and mixtures: 160 MB for 1000 steps

Row = dict[str, Any]


def sample_rows(policy: Policy, rollout: Rollout, step: int) -> list[Row]:
    """The rows of a step: one a response, of GROUPS whole groups of this host's problems (`chosen`).

    A row holds the text, its reward, and for each mixed token its span of characters (`mixed`) and its
    mixture (`mixtures`): the cosine of the input to its anchor, then text and weight of every candidate, the
    anchor first. Beyond STEP_BYTES the second group is left out, then mixtures are (their spans stay), then
    the ends of the longest texts (`cut`: how many characters). Besides these, for inspection, each response
    that ended in logits that are not finite (`nonfinite`).
    """
    group = rollout.rewards_PG.shape[1]
    budget, kept, ended = (
        STEP_BYTES,
        list[Row](),
        set(np.flatnonzero(rollout.trajectories.nonfinite_B).tolist()),
    )
    for number in chosen(rollout.rewards_PG, GROUPS):
        indices = range(number * group, (number + 1) * group)
        rows = _rows(policy, rollout, indices, step)
        size = sum(map(_size, rows))
        if kept and size > budget:
            break
        kept += rows if size <= budget else fitted(rows, budget)
        budget -= size
        ended -= set(indices)
    return kept + _rows(policy, rollout, sorted(ended), step)


def chosen(rewards_PG: np.ndarray, most: int) -> list[int]:
    """Which problems are kept: the one whose responses differ most in reward, then those of least reward.

    So wrong responses are seen where there are any; shares of right and wrong say nothing about the run.
    """
    deviations_P, means_P = rewards_PG.std(axis=1), rewards_PG.mean(axis=1)
    first = int(deviations_P.argmax())
    others = [int(p) for p in np.argsort(means_P, kind="stable") if p != first]
    return [first, *others][:most]


def fitted(rows: Sequence[Row], limit: int) -> list[Row]:
    """The rows in at most about `limit` bytes: fewer mixtures, then shorter texts, the longest first."""
    texts = [len(json.dumps(row["response"], ensure_ascii=False).encode()) for row in rows]
    bound = largest_bound(texts, limit)
    room = largest_bound(
        [_size(row) - text for row, text in zip(rows, texts, strict=True)],
        limit - sum(min(text, bound) for text in texts),
    )
    return [
        _shortened(row, bound if text > bound else None, room) for row, text in zip(rows, texts, strict=True)
    ]


def largest_bound(sizes: Sequence[int], total: int) -> int:
    """The largest bound for which the sizes, each cut to it, sum to at most `total`."""
    left = max(total, 0)
    for done, size in enumerate(ordered := sorted(sizes)):
        if size * (len(ordered) - done) > left:
            return left // (len(ordered) - done)
        left -= size
    return max(sizes, default=0)


def _shortened(row: Row, text_bytes: int | None, mixture_bytes: int) -> Row:
    response, mixed = row["response"], row["mixed"]
    cut = 0
    if text_bytes is not None:
        kept = response.encode()[:text_bytes].decode(errors="ignore")
        cut, response = len(response) - len(kept), kept
        mixed = [span for span in mixed if span[1] <= len(kept)]
    mixtures, used = [], 0
    for mixture in row["mixtures"][: len(mixed)]:
        used += _size(mixture)
        if used > mixture_bytes:
            break
        mixtures.append(mixture)
    return row | {"response": response, "mixed": mixed, "mixtures": mixtures} | ({"cut": cut} if cut else {})


def _rows(policy: Policy, rollout: Rollout, indices: Sequence[int], step: int) -> list[Row]:
    """The rows of these responses, whole."""
    tokenizer, group = policy.tokenizer_info.tokenizer, rollout.rewards_PG.shape[1]
    written = jax.tree.map(lambda leaf: leaf[np.asarray(indices, int)], rollout.trajectories)
    positions, cosines = mixed_cosines(policy, written)
    cosine_at = {(int(i), int(t)): float(c) for (i, t), c in zip(positions, cosines, strict=True)}
    spelled = functools.cache(lambda token: tokenizer.decode([token], skip_special_tokens=False))
    rows = []
    for own, index in enumerate(indices):
        problem, tokens = rollout.batch.problems[index // group], written.response(own)
        text, places = prompts.mixed_places(tokenizer, tokens, written.mixed_BT[own, : len(tokens)])
        row = {
            "step": step,
            "id": problem.id,
            "problem": problem.problem,
            "answer": problem.answer,
            "sample": index % group + 1,
            "response": text,
            "reward": float(rollout.rewards_PG[index // group, index % group]),
            "tokens": len(tokens),
            "stopped": bool(written.stopped_B[own]),
            "logprob": round(float(written.logprobs_BT[own, : len(tokens)].sum()), 3),
            "mixed": [[start, end] for start, end, _ in places],
            "mixtures": [
                [round(cosine_at[own, at], 4), *_candidates(written, own, at, spelled)] for _, _, at in places
            ],
        }
        rows.append(row | ({"nonfinite": True} if written.nonfinite_B[own] else {}))
    return rows


def _candidates(written: Trajectories, index: int, at: int, spelled: Any) -> list[Any]:
    """Text and weight of each candidate of a mixture, the anchor first."""
    mixture = jax.tree.map(lambda leaf: leaf[index, at], written.mixtures)
    pairs = zip(mixture.ids.tolist(), mixture.weights.tolist(), strict=True)
    return [part for token, weight in pairs for part in (spelled(token), round(weight, 4))]


def _size(value: Any) -> int:
    """Bytes of a value as JSON."""
    return len(json.dumps(value, ensure_ascii=False).encode())
