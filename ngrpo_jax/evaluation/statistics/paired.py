"""Two systems on the same problems: who solves what, and whether the difference could be chance.

Owns the paired table and McNemar's test, in NumPy. Must not know where the verdicts come from.
"""

import math
from typing import NamedTuple

import numpy as np

# Below this many discordant pairs the test is exact; above, the normal law is as good and needs no sum.
EXACT_BELOW = 1000


class Paired(NamedTuple):
    """How many problems both solve, only A, only B, and neither."""

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
        raise ValueError(f"paired verdicts have shapes {a.shape} and {b.shape}; both are one flag a problem")
    return Paired(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p that discordant pairs fall to A and B alike (McNemar, Psychometrika 12, 1947).

    Exact binomial below `EXACT_BELOW` discordant pairs; beyond, chi-square with one degree of freedom and
    Edwards' continuity correction. Without any discordant pair there is nothing to test: 1.
    """
    discordant = only_a + only_b
    if discordant == 0:
        return 1.0
    if discordant < EXACT_BELOW:
        tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
        return min(1.0, 2 * tail / 2**discordant)  # exact integers: the quotient alone is rounded
    square = max(0.0, abs(only_a - only_b) - 1) ** 2 / discordant
    return math.erfc(math.sqrt(square / 2))


def difference_interval(
    values_a_P: np.ndarray,
    values_b_P: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of B - A over problems, and its percentile bootstrap interval: problems stay paired.

    Returns:
        (difference, low, high)
    """
    gaps_P = np.asarray(values_b_P, float) - np.asarray(values_a_P, float)
    random = np.random.default_rng(seed)
    means = [gaps_P[random.integers(len(gaps_P), size=len(gaps_P))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(gaps_P.mean()), float(low), float(high)
