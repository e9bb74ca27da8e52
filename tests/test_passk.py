"""Pass@k (15) of arXiv 2606.10768 and the other estimators against exact fractions and enumeration."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from ngrpo_jax.evaluation.statistics import passk


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_equation_15_pass_at_k_against_exact_fractions(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            exact = float(1 - Fraction(comb(n - c, k), comb(n, k)))
            assert passk.pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-13, abs=0)


def test_equation_15_is_the_share_of_subsets_with_a_correct_sample():
    correct = np.array([1, 0, 0, 1, 0, 0, 0])
    for k in range(1, 8):
        share = np.mean([correct[list(subset)].any() for subset in combinations(range(7), k)])
        assert passk.pass_at_k(7, 2, k) == pytest.approx(share)


def test_pass_at_k_is_stable_for_large_n():
    exact = float(1 - Fraction(comb(10**6 - 3, 10), comb(10**6, 10)))
    assert passk.pass_at_k(10**6, 3, 10) == pytest.approx(exact, rel=1e-12)
    assert passk.pass_at_k(10**6, 10, 3) == pytest.approx(exact, rel=1e-12)
    assert 0.0 < passk.pass_at_k(10_000, 5_000, 64) <= 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=str(n)):
        passk.pass_at_k(n, c, k)


def test_metrics_weigh_problems_equally():
    correct_PN = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert passk.mean_at_n(correct_PN) == pytest.approx(5 / 12)
    assert passk.pass_at_k_by_problem(correct_PN, 2).mean() == pytest.approx((0.5 + 0 + 1) / 3)
    assert passk.pass_at_k_by_problem(correct_PN, 1).mean() == pytest.approx(passk.mean_at_n(correct_PN))
    assert passk.mean_at_n([[0.5, 1.0]]) == 0.75  # graded rewards have a mean, and no pass@k
    with pytest.raises(ValueError, match="pass@k"):
        passk.pass_at_k_by_problem([[0.5, 1.0]], 1)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0)])
def test_grades_without_rows_or_columns_are_refused(shape):
    with pytest.raises(ValueError, match="problems, samples"):
        passk.mean_at_n(np.zeros(shape))


def test_bootstrap_draws_with_replacement_and_so_reads_low():
    random = np.random.default_rng(1)
    correct_PN = random.random((40, 16)) < random.random((40, 1)) * 0.4
    for k in (1, 4, 16):
        expected = np.mean(1 - (1 - correct_PN.mean(axis=1)) ** k)
        found = passk.best_at_k_bootstrap(correct_PN, k, resamples=2000)
        assert found == pytest.approx(expected, abs=0.005)
    assert found < passk.pass_at_k_by_problem(correct_PN, 16).mean()


def test_bootstrap_is_a_function_of_its_seed():
    correct_PN = np.eye(6, dtype=bool)
    first = passk.best_at_k_bootstrap(correct_PN, 3, seed=3)
    assert first == passk.best_at_k_bootstrap(correct_PN, 3, seed=3)
    assert first != passk.best_at_k_bootstrap(correct_PN, 3, seed=4)
    for bad in ({"k": 7}, {"k": 0}, {"k": 2, "resamples": 0}):
        with pytest.raises(ValueError, match=r"best@k|resamples"):
            passk.best_at_k_bootstrap(correct_PN, **bad)


def test_majority_counts_answers_not_graders():
    answers = [["4", "5", "5", None], ["1", "2", "3", "1"], [None] * 4, ["7", "8", "8", "7"]]
    correct = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    # 5 wins and is right; 1 wins and is wrong; nobody answered; 7 and 8 tie and 7 came first.
    np.testing.assert_array_equal(passk.majority_by_problem(answers, correct), [True, False, False, True])
    with pytest.raises(ValueError, match="as many answers as grades"):
        passk.majority_by_problem([["4"]], [[1, 0]])


def test_interval_over_problems_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        correct_PN = random.random((50, 4)) < random.beta(1, 2, (50, 1))  # the true mean is 1/3
        low, high = passk.bootstrap_interval(correct_PN.mean(axis=1), resamples=200, seed=trial)
        covered += low <= 1 / 3 <= high
    assert 0.89 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("level", "deviations"), [(0.95, 1.96), (0.5, 0.674)])
def test_interval_is_that_of_the_normal_approximation_for_many_problems(level, deviations):
    values_P = np.random.default_rng(3).random(2000)
    low, high = passk.bootstrap_interval(values_P, level=level, resamples=4000)
    error = deviations * values_P.std() / np.sqrt(len(values_P))
    assert low == pytest.approx(values_P.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values_P.mean() + error, abs=0.1 * error)


def test_interval_of_pass_at_k_holds_its_value():
    correct_PN = np.random.default_rng(2).random((30, 8)) < 0.2
    values_P = passk.pass_at_k_by_problem(correct_PN, 4)
    low, high = passk.bootstrap_interval(values_P)
    assert low < values_P.mean() < high
    with pytest.raises(ValueError, match="level"):
        passk.bootstrap_interval(values_P, level=1.0)
