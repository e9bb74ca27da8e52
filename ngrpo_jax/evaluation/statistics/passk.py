"""Accuracy figures of repeated sampling: Mean@n, Pass@k, best@k, majority, and their uncertainty.

Owns the estimators alone, in NumPy. `correct_PN` is bool or 0/1, one row a problem, one column a sample. Must
not know how responses were made or graded.

N is samples of a problem, P problems.
"""

from collections.abc import Callable, Hashable, Sequence

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
    """Mean@n: the share of correct samples; a graded reward gives the mean reward."""
    return float(_grades(correct_PN).mean())


def pass_at_k_by_problem(correct_PN: np.ndarray, k: int) -> np.ndarray:
    """Pass@k of each problem, float64 [P]."""
    matrix = _matrix(correct_PN)
    return np.array([pass_at_k(matrix.shape[1], int(c), k) for c in matrix.sum(axis=1)])


def best_at_k_bootstrap(correct_PN: np.ndarray, k: int, *, resamples: int = 1000, seed: int = 0) -> float:
    """best@k (bootstrap): the estimator behind the paper's tables, kept to compare with them.

    For each problem k samples are drawn with replacement, `resamples` times; the share of draws that hold a
    correct one, averaged over problems. Such draws repeat samples, so it reads below pass@k: its expectation
    is 1 - (1 - c/n)^k.

    Raises:
        ValueError: k outside 1..n, or resamples below 1.
    """
    matrix = _matrix(correct_PN)
    if not 1 <= k <= matrix.shape[1]:
        raise ValueError(f"best@k needs 1 <= k <= n, but k is {k} and n is {matrix.shape[1]}")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; at least one is needed")
    random = np.random.default_rng(seed)
    shares = [row[random.integers(len(row), size=(resamples, k))].any(axis=1).mean() for row in matrix]
    return float(np.mean(shares))


def majority_by_problem(
    answers_PN: Sequence[Sequence[Hashable | None]], correct_PN: np.ndarray
) -> np.ndarray:
    """maj@n of each problem: whether its most frequent answer is correct, bool [P].

    None is no answer and has no vote; of equally frequent answers the one that came first stands.

    Args:
        answers_PN: the final answers, equal ones equal and hashable.
        correct_PN: whether each is correct.

    Raises:
        ValueError: the two do not have the same shape.
    """
    matrix = _matrix(correct_PN)
    if len(answers_PN) != len(matrix) or any(len(row) != matrix.shape[1] for row in answers_PN):
        raise ValueError(f"maj@n needs as many answers as grades, {matrix.shape[0]} × {matrix.shape[1]}")
    return np.array(
        [_majority_correct(answers, row) for answers, row in zip(answers_PN, matrix, strict=True)]
    )


def bootstrap_interval(
    correct_PN: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a figure that is a mean over problems.

    Problems are drawn with replacement, for they are what a benchmark is a sample of.

    Args:
        statistic: the figure of each problem, correct_PN -> float [P], such as `np.mean` over axis 1 or
            `pass_at_k_by_problem` with k.

    Raises:
        ValueError: level outside (0, 1), or resamples below 1.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"level is {level} and resamples {resamples}; give a level in (0, 1) and resamples >= 1"
        )
    values_P = np.asarray(statistic(_grades(correct_PN)), dtype=np.float64)
    random = np.random.default_rng(seed)
    # One draw at a time: [resamples, P] indices would be needless memory for large benchmarks.
    means = [values_P[random.integers(len(values_P), size=len(values_P))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _majority_correct(answers: Sequence[Hashable | None], correct_N: np.ndarray) -> bool:
    votes: dict[Hashable, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            votes.setdefault(answer, []).append(index)
    if not votes:
        return False
    winner = max(votes.values(), key=len)  # the first of equals: dicts keep the order of arrival
    return bool(correct_N[winner[0]])


def _grades(correct_PN: np.ndarray) -> np.ndarray:
    grades = np.asarray(correct_PN)
    if grades.ndim != 2 or not grades.size:
        raise ValueError(
            f"grades have shape {grades.shape}; they are [problems, samples], none of them empty"
        )
    return grades


def _matrix(correct_PN: np.ndarray) -> np.ndarray:
    grades = _grades(correct_PN)
    if not np.isin(grades, (0, 1)).all():
        raise ValueError("grades are neither booleans nor 0 and 1; only those have a pass@k")
    return grades.astype(bool)
