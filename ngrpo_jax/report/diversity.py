"""How much the responses to one problem differ, for stored evaluations. Owns the layout of that table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ngrpo_jax.evaluation import generations
from ngrpo_jax.evaluation.generations import Generations
from ngrpo_jax.evaluation.statistics.diversity import group_diversity
from ngrpo_jax.runtime import console

# The cost of edit distances is quadratic in both: within these limits a benchmark takes minutes.
MOST_SAMPLES, MOST_TOKENS = 8, 512

_TITLES = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_4": "distinct-4",
    "edit_distance": "edit distance",
    "answers": "distinct answers",
}


def table(paths: Sequence[Path]) -> str:
    """A row for each file of generations (of a folder: all its files), each metric a mean over problems.

    Raises UserError where there is nothing to read.
    """
    rows = []
    for one in generations.read_all(paths):
        metrics, samples = _metrics(one), min(one.samples, MOST_SAMPLES)
        rows.append((one.label, len(one.problems), samples, *(metrics[name] for name in _TITLES)))
    headers = ("", "problems", "samples", *_TITLES.values())
    return (
        f"{console.table(rows, headers)}\n\n"
        f"Means over problems, of the first {MOST_SAMPLES} samples at most. distinct-n: distinct n-grams of "
        f"tokens as a share of all n-grams of a problem's responses.\nedit distance: mean over pairs of "
        f"responses, as a share of the longer one, of the first {MOST_TOKENS} tokens."
    )


def _metrics(one: Generations) -> dict[str, float]:
    groups = [
        group_diversity(
            [row["token_ids"] for row in rows[:MOST_SAMPLES]], answers[:MOST_SAMPLES], max_tokens=MOST_TOKENS
        )
        for rows, answers in zip(one.problems, one.graded().answers_PG, strict=True)
    ]
    return {name: _mean([group[name] for group in groups]) for name in groups[0]}


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values: a group of too short responses, or of one sample, has NaN."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
