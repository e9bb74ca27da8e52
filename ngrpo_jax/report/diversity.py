"""How much the responses to one problem differ, for each stored evaluation. Owns that table's layout."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ngrpo_jax.errors import UserError
from ngrpo_jax.evaluation import generations
from ngrpo_jax.evaluation.generations import Generations
from ngrpo_jax.evaluation.statistics.diversity import group_diversity
from ngrpo_jax.runtime import console

# Edit distances grow with the square of both: these keep a benchmark within minutes.
MOST_SAMPLES, MOST_TOKENS = 8, 512

_TITLES = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_4": "distinct-4",
    "edit_distance": "edit distance",
    "answers": "distinct answers",
}


def table(paths: Sequence[Path]) -> str:
    """A row for each file of generations (of a folder: all of them), each figure a mean over problems.

    Raises ValueError or FileNotFoundError, in one sentence, where there is nothing to read.
    """
    files = [file for path in paths for file in (generations.find(path) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"{paths[0]} has no generations_*.jsonl; evaluate writes them")
    rows = []
    for one in map(generations.read, files):
        samples = one.header["depends"]["eval.samples"]
        figures = _figures(one)
        rows.append(
            (one.label, len(one.problems), min(samples, MOST_SAMPLES), *(figures[name] for name in _TITLES))
        )
    headers = ("", "problems", "samples", *_TITLES.values())
    return (
        f"{console.table(rows, headers)}\n\n"
        f"Means over problems, of the first {MOST_SAMPLES} samples at most. distinct-n: different n-grams of "
        f"tokens over all of a group's.\nedit distance: mean over pairs, as a share of the longer response, "
        f"of the first {MOST_TOKENS} tokens."
    )


def _figures(one: Generations) -> dict[str, float]:
    if not one.problems:
        raise UserError(f"{one.path} holds no finished problem yet")
    votes = one.graded().answers_PG
    groups = []
    for rows, answers in zip(one.problems, votes, strict=True):
        some = rows[:MOST_SAMPLES]
        groups.append(
            group_diversity([r["token_ids"] for r in some], answers[: len(some)], max_tokens=MOST_TOKENS)
        )
    return {name: _mean([group[name] for group in groups]) for name in groups[0]}


def _mean(values: Sequence[float]) -> float:
    """Over the groups that have the figure: too short responses have no n-gram, one sample has no pair."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
