"""Two systems on the same problems: which of them solves which problem, and whether chance explains it.

Owns the paired table, McNemar's test and the interval of a paired difference. Must not know where the
verdicts come from.
"""

import math
from typing import NamedTuple

import numpy as np

from ngrpo_jax.evaluation.statistics.passk import bootstrap_interval

# Below this many discordant pairs the test is exact; above, the normal approximation is as good.
EXACT_BELOW = 1000


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

    @property
    def p_value(self) -> float:
        """McNemar's two-sided p of (only A, only B)."""
        return mcnemar(self.only_a, self.only_b)


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

    McNemar (Psychometrika 12, 1947): exact binomial below `EXACT_BELOW` discordant pairs; from there on
    chi-square with one degree of freedom and Edwards' continuity correction. 1 without discordant pairs.
    """
    discordant = only_a + only_b
    if discordant == 0:
        return 1.0
    if discordant < EXACT_BELOW:
        tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
        return min(1.0, 2 * tail / 2**discordant)  # exact integers: the quotient alone is rounded
    square = max(0.0, abs(only_a - only_b) - 1) ** 2 / discordant
    return math.erfc(math.sqrt(square / 2))


def difference_interval(values_a_P: np.ndarray, values_b_P: np.ndarray) -> tuple[float, float, float]:
    """(mean of B - A over problems, low, high): its 95 % bootstrap interval, with problems kept paired."""
    gaps_P = np.asarray(values_b_P, float) - np.asarray(values_a_P, float)
    return float(gaps_P.mean()), *bootstrap_interval(gaps_P)
