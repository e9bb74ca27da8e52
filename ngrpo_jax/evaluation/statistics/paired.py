"""Two systems on the same problems: which of them solves which problem, and whether chance explains it.

Owns the paired table, McNemar's test and the interval of a paired difference. Must not know where the
verdicts come from.
"""

from typing import NamedTuple

import numpy as np

from ngrpo_jax.evaluation.statistics.passk import bootstrap_interval


class Paired(NamedTuple):
    """How many problems both systems solve, only A, only B, and neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        """All problems."""
        return sum(self)


def paired_table(solved_a_P: np.ndarray, solved_b_P: np.ndarray) -> Paired:
    """The paired table of two bool vectors over the same problems.

    Raises:
        ValueError: the two do not have the same length.
    """
    a, b = np.asarray(solved_a_P, bool), np.asarray(solved_b_P, bool)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"paired verdicts have shapes {a.shape} and {b.shape}; both must be [problems]")
    return Paired(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of the hypothesis that a discordant pair is as likely A's as B's.

    McNemar's test (Psychometrika 12, 1947) by the exact binomial law; 1 without discordant pairs.
    """
    from scipy import stats  # not at the top: its import takes a second, and only a comparison needs it

    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def difference_interval(values_a_P: np.ndarray, values_b_P: np.ndarray) -> tuple[float, float, float]:
    """(mean of B - A over problems, low, high): its 95 % bootstrap interval, with problems kept paired."""
    gaps_P = np.asarray(values_b_P, float) - np.asarray(values_a_P, float)
    return float(gaps_P.mean()), *bootstrap_interval(gaps_P)
