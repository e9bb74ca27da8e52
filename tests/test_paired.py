"""The paired table and McNemar's test, by hand and against the binomial law summed as fractions."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from ngrpo_jax.evaluation.statistics import paired


def test_the_table_counts_each_problem_once():
    a = np.array([1, 1, 0, 0, 1, 0, 0], bool)
    b = np.array([1, 0, 1, 0, 0, 0, 1], bool)
    table = paired.paired_table(a, b)
    assert table == (1, 2, 2, 2) and table.total == 7
    with pytest.raises(ValueError, match=r"shapes \(7,\) and \(6,\)"):
        paired.paired_table(a, b[:6])


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 3), (1, 9), (5, 5), (20, 7), (400, 331), (560, 640)])
def test_mcnemar_is_the_two_sided_binomial_test(only_a, only_b):
    n, k = only_a + only_b, min(only_a, only_b)
    exact = min(1, 2 * sum(Fraction(comb(n, i), 2**n) for i in range(k + 1)))
    assert paired.mcnemar(only_a, only_b) == pytest.approx(float(exact), rel=1e-12)
    assert paired.mcnemar(only_a, only_b) == paired.mcnemar(only_b, only_a)


def test_mcnemar_by_known_values():
    assert paired.mcnemar(0, 0) == 1.0
    assert paired.mcnemar(0, 6) == 0.03125  # 2 / 2^6
    assert paired.mcnemar(8, 8) == 1.0


def test_the_interval_of_a_difference_keeps_problems_paired():
    random = np.random.default_rng(0)
    hard_P = random.random(200)  # problems differ far more than the systems do
    gap, low, high = paired.difference_interval(hard_P, hard_P + 0.05 + 0.01 * random.standard_normal(200))
    assert gap == pytest.approx(0.05, abs=0.005) and 0.045 < low < gap < high < 0.055
