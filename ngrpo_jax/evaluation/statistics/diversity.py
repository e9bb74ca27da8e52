"""How much the responses to one problem differ: distinct n-grams, edit distances, distinct answers.

Owns these metrics of sequences of tokens (ids or words). Must not know where the sequences come from.
T and U are the lengths of two responses.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations

import numpy as np

Tokens = Sequence[Hashable]


def distinct_ngrams(responses: Sequence[Tokens], n: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): distinct n-grams divided by all n-grams of the group.

    1 where no n-gram occurs twice, near 0 where the responses repeat one another (or themselves); NaN where
    no response has n tokens.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one token")
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def edit_distance(a: Tokens, b: Tokens) -> int:
    """Levenshtein distance in tokens: insertions, deletions, substitutions. O(len(a)) vector operations."""
    codes = np.unique([*a, *b], return_inverse=True)[1]
    a_T, b_U = codes[: len(a)], codes[len(a) :]
    offsets = np.arange(len(b_U) + 1)
    row = offsets.copy()
    for i, token in enumerate(a_T, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b_U != token))  # deletion, substitution
        candidates = np.concatenate([[i], best])
        # An insertion comes from the left neighbour: row[j] = min over h <= j of candidates[h] + (j - h).
        row = np.minimum.accumulate(candidates - offsets) + offsets
    return int(row[-1])


def mean_pairwise_distance(responses: Sequence[Tokens], *, max_tokens: int = 2048) -> float:
    """Mean over pairs of edit distance / length of the longer: 0 for equal responses, 1 with no common token.

    Args:
        responses: at least two; with fewer the mean is NaN.
        max_tokens: longer responses are compared by their first tokens, since the cost is quadratic.
    """
    heads = [tokens[:max_tokens] for tokens in responses]
    pairs = list(combinations(heads, 2))
    if not pairs:
        return float("nan")
    return float(np.mean([edit_distance(a, b) / max(len(a), len(b), 1) for a, b in pairs]))


def group_diversity(
    responses: Sequence[Tokens], answers: Sequence[Hashable | None], *, max_tokens: int = 2048
) -> dict[str, float]:
    """The metrics of one group by name; `max_tokens` as `mean_pairwise_distance` takes it.

    Raises:
        ValueError: the numbers of answers and responses differ.
    """
    if len(responses) != len(answers):
        raise ValueError(f"a group of {len(responses)} responses got {len(answers)} answers")
    metrics = {f"distinct_{n}": distinct_ngrams(responses, n) for n in (1, 2, 4)}
    metrics["edit_distance"] = mean_pairwise_distance(responses, max_tokens=max_tokens)
    metrics["answers"] = float(len(set(answers) - {None}))  # None is no answer
    return metrics
