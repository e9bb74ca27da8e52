"""All figures of one data set's graded responses, each with its uncertainty.

Owns which figures there are and their names. Must not know how responses were made, stored or graded: the
same arrays give the same figures, to the bit, wherever they come from.

N is samples of a problem, P problems.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ngrpo_jax.evaluation.statistics import passk

CORRECT_ABOVE = 0.5  # a graded reward counts as correct above this


class Graded(NamedTuple):
    """P problems with n responses each.

    Attributes:
      rewards_PN: float, what the grader gave.
      answers_PN: each response's final answer, equal ones equal and hashable; None where it has none.
      lengths_PN: int, response tokens.
      stopped_PN: bool, whether the response ended by itself rather than at its limit.
    """

    rewards_PN: np.ndarray
    answers_PN: Sequence[Sequence[Hashable | None]]
    lengths_PN: np.ndarray
    stopped_PN: np.ndarray

    @property
    def correct_PN(self) -> np.ndarray:
        """bool: which responses are right."""
        return np.asarray(self.rewards_PN) > CORRECT_ABOVE


class Figure(NamedTuple):
    """A value, and its 95 % interval by bootstrap over problems where it is a mean over them."""

    value: float
    low: float | None = None
    high: float | None = None


def figures(graded: Graded, pass_k: Sequence[int]) -> dict[str, Figure]:
    """An evaluation's figures by name: mean_at_n, pass_at_K and best_at_K for each K, maj_at_n, of the texts.

    maj_at_n is left out where no response has an answer that could be voted for.

    Raises:
        ValueError: a k above the number of samples.
    """
    correct_PN = graded.correct_PN
    found = {"mean_at_n": _over_problems(graded.rewards_PN, lambda grades: grades.mean(axis=1))}
    for k in sorted(set(pass_k)):
        found[f"pass_at_{k}"] = _over_problems(correct_PN, _pass_at(k))
        found[f"best_at_{k}"] = Figure(passk.best_at_k_bootstrap(correct_PN, k))
    if any(answer is not None for answers in graded.answers_PN for answer in answers):
        majority_P = passk.majority_by_problem(graded.answers_PN, correct_PN)
        found["maj_at_n"] = _over_problems(majority_P[:, None], lambda values: values[:, 0])
    none_PN = np.array([[answer is None for answer in answers] for answers in graded.answers_PN])
    found["truncated"] = Figure(float(1.0 - np.mean(graded.stopped_PN)))
    found["no_answer"] = Figure(float(none_PN.mean()))
    found["length_mean"] = Figure(float(np.mean(graded.lengths_PN)))
    found["length_max"] = Figure(float(np.max(graded.lengths_PN)))
    return found


def training_figures(graded: Graded, largest_k: int) -> dict[str, float]:
    """What a training run records of an evaluation: plain numbers, one Pass@k; maj_at_n 0 without answers."""
    found = {"maj_at_n": Figure(0.0), **figures(graded, (largest_k,))}
    names = {
        "mean_at_n": "mean_at_n",
        f"pass_at_{largest_k}": "pass_at_k",
        "maj_at_n": "maj_at_n",
        "truncated": "truncated",
        "length_mean": "length_mean",
    }
    return {name: found[key].value for key, name in names.items()}


def average(of_sets: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """The plain mean over data sets of the figures that all of them have, as the paper averages."""
    shared = [name for name in of_sets[0] if all(name in one for one in of_sets)]
    return {name: Figure(float(np.mean([one[name].value for one in of_sets]))) for name in shared}


def _pass_at(k: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda grades: passk.pass_at_k_by_problem(grades, k)


def _over_problems(grades_PN: np.ndarray, by_problem: Callable[[np.ndarray], np.ndarray]) -> Figure:
    value = float(np.mean(by_problem(np.asarray(grades_PN)), dtype=np.float64))
    return Figure(value, *passk.bootstrap_interval(grades_PN, by_problem))
