"""Accuracy of repeated sampling: Mean@n, Pass@k, best@k, majority voting, and bootstrap intervals.

Owns the estimators, in NumPy. Must not know how responses were made or graded. `correct_PN` is bool or 0/1.
N is the samples of a problem: the signatures that programs outside this repository call have that letter.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k of n samples, c of them correct, hold a correct one (15).

    1 - C(n-c, k) / C(n, k), from a sum of min(c, k) logarithms: large n neither overflows nor cancels.

    Raises:
        ValueError: k below 1 or above n, or c outside 0..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, but k is {k} and n is {n}; draw at least k samples")
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct samples of {n} is impossible")
    if n - c < k:
        return 1.0
    # C(n-c, k) / C(n, k) = prod over i in n-c+1..n of (1 - k/i), and the same with c and k exchanged.
    fewer, more = min(c, k), max(c, k)
    return float(-np.expm1(np.log1p(-more / np.arange(n - fewer + 1, n + 1)).sum()))


def mean_at_n(correct_PN: np.ndarray) -> float:
    """Mean@n: the share of correct samples; of rewards between 0 and 1, their mean."""
    return float(_non_empty(correct_PN).mean())


def pass_at_k_by_problem(correct_PN: np.ndarray, k: int) -> np.ndarray:
    """Pass@k of each problem, float64 [P]."""
    flags_PN = _boolean(correct_PN)
    return np.array([pass_at_k(flags_PN.shape[1], int(c), k) for c in flags_PN.sum(axis=1)])


def best_at_k_bootstrap(correct_PN: np.ndarray, k: int, *, resamples: int = 1000, seed: int = 0) -> float:
    """best@k (bootstrap): the estimator behind the paper's tables, kept to compare with them.

    For each problem k samples are drawn with replacement, `resamples` times; the share of draws that hold a
    correct one is averaged over problems. Such draws repeat samples, so that best@k is below pass@k: its
    expectation is 1 - (1 - c/n)^k.

    Raises:
        ValueError: k outside 1..n, or resamples below 1.
    """
    flags_PN = _boolean(correct_PN)
    if not 1 <= k <= flags_PN.shape[1]:
        raise ValueError(f"best@k needs 1 <= k <= n, but k is {k} and n is {flags_PN.shape[1]}")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; at least one is needed")
    random = np.random.default_rng(seed)
    shares = [row[random.integers(len(row), size=(resamples, k))].any(axis=1).mean() for row in flags_PN]
    return float(np.mean(shares))


def majority_by_problem(
    answers_PN: Sequence[Sequence[Hashable | None]], correct_PN: np.ndarray
) -> np.ndarray:
    """maj@n of each problem: whether its most frequent answer is correct, bool [P].

    None is no answer and has no vote; of equally frequent answers the first is taken.

    Args:
        answers_PN: the final answers, equal ones equal and hashable.
        correct_PN: whether each is correct.

    Raises:
        ValueError: the two do not have the same shape.
    """
    flags_PN = _boolean(correct_PN)
    if len(answers_PN) != len(flags_PN) or any(len(row) != flags_PN.shape[1] for row in answers_PN):
        raise ValueError(f"maj@n needs as many answers as grades, {flags_PN.shape[0]} × {flags_PN.shape[1]}")
    pairs = zip(answers_PN, flags_PN, strict=True)
    return np.array([_majority_correct(answers, flags) for answers, flags in pairs])


def bootstrap_interval(
    values_P: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of one value a problem.

    Problems are drawn with replacement, since a benchmark is a sample of problems.

    Raises:
        ValueError: no value, level outside (0, 1), or resamples below 1.
    """
    values_P = np.asarray(values_P, dtype=np.float64)
    if not values_P.size or not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"an interval needs values (got {values_P.size}), a level in (0, 1) (got {level}), and one "
            f"resample or more (got {resamples})"
        )
    random = np.random.default_rng(seed)
    # One draw at a time: [resamples, P] indices would be needless memory for large benchmarks.
    means = [values_P[random.integers(len(values_P), size=len(values_P))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _majority_correct(answers: Sequence[Hashable | None], correct_N: np.ndarray) -> bool:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner, _ = max(votes.items(), key=lambda vote: vote[1])  # the first of equals: votes are in order
    return bool(correct_N[list(answers).index(winner)])


def _non_empty(correct_PN: np.ndarray) -> np.ndarray:
    grades = np.asarray(correct_PN)
    if grades.ndim != 2 or not grades.size:
        raise ValueError(
            f"grades have shape {grades.shape}; they are [problems, samples], none of them empty"
        )
    return grades


def _boolean(correct_PN: np.ndarray) -> np.ndarray:
    grades = _non_empty(correct_PN)
    if not np.isin(grades, (0, 1)).all():
        raise ValueError("grades are neither booleans nor 0 and 1; only those have a pass@k")
    return grades.astype(bool)
