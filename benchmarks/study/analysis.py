"""Differences between arms: per-problem scores, paired differences, their intervals and verdicts.

Owns the statistics. Must not know where counts come from. S is seeds, P is problems of a seed.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ngrpo_jax.evaluation.statistics.passk import pass_at_k


@functools.lru_cache
def _pass_table(k: int, samples: int) -> np.ndarray:
    return np.array([pass_at_k(samples, c, k) for c in range(samples + 1)])


def pass_at(k: int, counts_P: np.ndarray, samples: int) -> np.ndarray:
    """Unbiased Pass@k of each problem, from its correct samples."""
    return _pass_table(k, samples)[counts_P]


def mean(counts_P: np.ndarray, samples: int) -> float:
    """Mean@n over the problems."""
    return float(counts_P.mean() / samples)


def hierarchical_interval(
    gaps_SP: np.ndarray, *, level: float = 0.95, resamples: int = 4000
) -> tuple[float, float]:
    """Percentile interval of the mean, by drawing seeds and, within each drawn seed, its problems.

    The numbers come from NumPy's legacy generator, whose stream no later version changes.
    """
    gaps_SP = np.asarray(gaps_SP, float)
    seeds, problems = gaps_SP.shape
    random = np.random.RandomState(0)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn_S1 = random.randint(seeds, size=(seeds, 1))
        means[i] = gaps_SP[drawn_S1, random.randint(problems, size=(seeds, problems))].mean()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean over seeds of a paired difference, in the unit of the scores.

    Attributes:
      seeds: how many.
      value: the mean.
      deviation: standard deviation over seeds.
      low, high: 95 % paired t interval over seeds.
      p: two-sided, of the paired t test.
    """

    seeds: int
    value: float
    deviation: float
    low: float
    high: float
    p: float


def paired_difference(gaps_SP: np.ndarray) -> Difference:
    """The difference of two arms from their per-problem gaps; two seeds or more."""
    from scipy import stats

    gaps_S = np.asarray(gaps_SP, float).mean(axis=1)
    seeds, value = len(gaps_S), float(gaps_S.mean())
    deviation = float(gaps_S.std(ddof=1))
    error = deviation / seeds**0.5
    half = float(stats.t.ppf(0.975, seeds - 1)) * error
    p = float(2 * stats.t.sf(abs(value) / error, seeds - 1)) if error > 0 else 1.0
    return Difference(seeds, value, deviation, value - half, value + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scand. J. Statist. 6, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def verdict(difference: Difference, adjusted_p: float, smallest: float = 0.01) -> str:
    """ "effect", "none" (the t interval lies within ±smallest) or "inconclusive".

    An effect whose whole interval is below the smallest one of interest is called small.
    """
    within = -smallest < difference.low and difference.high < smallest
    if adjusted_p < 0.05:
        return "small effect" if within else "effect"
    return "none" if within else "inconclusive"


def detectable(deviation: float, seeds: int, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that a paired t test finds with this power, by the noncentral t law.

    Args:
      deviation: of the paired difference over seeds.
      level: two-sided.
    """
    from scipy import optimize, stats

    bound = stats.t.ppf(1 - level / 2, seeds - 1)

    def lacking(effect: float) -> float:
        return float(stats.nct.sf(bound, seeds - 1, effect * seeds**0.5)) - power

    return float(optimize.brentq(lacking, 0.01, 20.0)) * deviation
