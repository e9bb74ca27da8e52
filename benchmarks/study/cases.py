"""Single responses that one mixed step turned: from right to wrong, or from wrong to right.

A base model answers its seed's held-out problems twice from the same random numbers, with and without
mixing. Where the mixed response has exactly one mixed step, the two are alike up to that step, and what
differs is its doing. The cases are chosen by rule: in the order of problems and samples, the first of each
kind. Must not know other arms.
"""

import json
import pathlib
from typing import Any

import numpy as np

from benchmarks.study.trial import Study
from ngrpo_jax.evaluation.answering import Responses
from ngrpo_jax.setup.problems import ProblemSet

EACH = 5  # of either kind
Case = dict[str, Any]


def find(study: Study, task: str, seed: int) -> list[Case]:
    """EACH cases turned right, then EACH turned wrong; fewer where there are fewer."""
    mixed, problems, vocabulary = study.responses(task, "base_ngrpo", seed)
    plain, _, _ = study.responses(task, "base", seed)
    once_B = mixed.trajectories.mixed_BT.sum(axis=1) == 1
    mixed_B, plain_B = (responses.rewards_PG.reshape(-1) > 0.5 for responses in (mixed, plain))
    found = []
    for kind, turned_B in (("right", mixed_B & ~plain_B), ("wrong", plain_B & ~mixed_B)):
        chosen = np.flatnonzero(once_B & turned_B)[:EACH]
        found += [_case(kind, int(i), mixed, plain, problems, vocabulary) for i in chosen]
    return found


def _case(
    kind: str,
    at: int,
    mixed: Responses,
    plain: Responses,
    problems: ProblemSet,
    vocabulary: tuple[str, ...],
) -> Case:
    position = int(np.flatnonzero(mixed.trajectories.mixed_BT[at])[0])
    ids, weights = (leaf[at, position].tolist() for leaf in mixed.trajectories.mixtures[:2])
    return {
        "turned": kind,
        "problem": problems.problems[at // mixed.rewards_PG.shape[1]].problem,
        "mixed": mixed.texts[at],
        "plain": plain.texts[at],
        "word": position + 1,
        "mixture": [[vocabulary[i], round(weight, 3)] for i, weight in zip(ids, weights, strict=True)],
    }


def write(study: Study, task: str, seed: int, folder: pathlib.Path) -> None:
    """Writes FOLDER/cases/TASK.json."""
    path = folder / "cases" / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(find(study, task, seed), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(path)
