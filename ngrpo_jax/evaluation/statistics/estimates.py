"""The metrics of a data set's graded responses, each with its uncertainty.

Owns which metrics there are and their names. Must not know how responses were made, stored or graded: equal
arrays give equal metrics, bit for bit, whether they come from a model or from a file.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ngrpo_jax.evaluation.statistics import passk

CORRECT_ABOVE = 0.5  # a reward above this counts as correct
NEAR = 0.95  # Appendix E counts the inputs whose cosine to their anchor is below this


class GradedResponses(NamedTuple):
    """The responses to P problems, G samples each, as numbers.

    Attributes:
      rewards_PG: float, by the grader.
      answers_PG: final answers, equal ones equal and hashable; None where a response has none.
      lengths_PG: int, response tokens.
      stopped_PG: bool, False where a response was cut off at the limit of its length.
    """

    rewards_PG: np.ndarray
    answers_PG: Sequence[Sequence[Hashable | None]]
    lengths_PG: np.ndarray
    stopped_PG: np.ndarray

    @property
    def correct_PG(self) -> np.ndarray:
        """bool: which responses are correct."""
        return np.asarray(self.rewards_PG) > CORRECT_ABOVE


class Estimate(NamedTuple):
    """A value, and the 95 % interval by bootstrap over problems where the value is a mean over problems."""

    value: float
    low: float | None = None
    high: float | None = None


def estimate_metrics(graded: GradedResponses, pass_k: Sequence[int]) -> dict[str, Estimate]:
    """All metrics by name: mean_at_n, pass_at_K and best_at_K for each K of `pass_k`, maj_at_n, of the texts.

    maj_at_n is left out where no response has a final answer.

    Raises:
        ValueError: a k above the number of samples.
    """
    correct_PG = graded.correct_PG
    metrics = {"mean_at_n": _over_problems(np.mean(graded.rewards_PG, axis=1))}
    for k in sorted(set(pass_k)):
        metrics[f"pass_at_{k}"] = _over_problems(passk.pass_at_k_by_problem(correct_PG, k))
        metrics[f"best_at_{k}"] = Estimate(passk.best_at_k_bootstrap(correct_PG, k))
    unanswered_PG = np.array([[answer is None for answer in answers] for answers in graded.answers_PG])
    if not unanswered_PG.all():
        metrics["maj_at_n"] = _over_problems(passk.majority_by_problem(graded.answers_PG, correct_PG))
    metrics["truncated"] = Estimate(float(1.0 - np.mean(graded.stopped_PG)))
    metrics["no_answer"] = Estimate(float(unanswered_PG.mean()))
    metrics["length_mean"] = Estimate(float(np.mean(graded.lengths_PG)))
    metrics["length_max"] = Estimate(float(np.max(graded.lengths_PG)))
    return metrics


def training_estimates(graded: GradedResponses, largest_k: int) -> dict[str, Estimate]:
    """What a training run records of an evaluation: one Pass@k; maj_at_n 0 without answers."""
    found = {"maj_at_n": Estimate(0.0), **estimate_metrics(graded, (largest_k,))}
    found["pass_at_k"] = found[f"pass_at_{largest_k}"]
    names = ("mean_at_n", "pass_at_k", "maj_at_n", "truncated", "length_mean")
    return {name: found[name] for name in names}


def cosine_metrics(cosines: np.ndarray) -> dict[str, float]:
    """Appendix E: mean, min and the share below 0.95 of mixed inputs' cosines to their anchors."""
    return {
        "mean": float(np.mean(cosines)),
        "min": float(np.min(cosines)),
        "below_095": float(np.mean(cosines < NEAR)),
    }


def average(of_sets: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """The mean over data sets, each counted once, of the metrics that all have, as the paper averages."""
    shared = [name for name in of_sets[0] if all(name in metrics for metrics in of_sets)]
    return {name: Estimate(float(np.mean([one[name].value for one in of_sets]))) for name in shared}


def _over_problems(values_P: np.ndarray) -> Estimate:
    return Estimate(float(np.mean(values_P, dtype=np.float64)), *passk.bootstrap_interval(values_P))
