"""Metrics of a group's differences: small cases by hand, and the edit distance against its textbook table."""

import math

import numpy as np
import pytest

from ngrpo_jax.evaluation.statistics import diversity


def _textbook_distance(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replace = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, replace)
    return table[-1, -1]


def test_distinct_ngrams_by_hand():
    group = [[1, 2, 3], [1, 2, 4]]
    assert diversity.distinct_ngrams(group, 1) == 4 / 6
    assert diversity.distinct_ngrams(group, 2) == 3 / 4  # (1,2) twice, (2,3), (2,4)
    assert diversity.distinct_ngrams([["a"] * 5], 1) == 1 / 5
    assert math.isnan(diversity.distinct_ngrams(group, 4))
    with pytest.raises(ValueError, match="n is 0"):
        diversity.distinct_ngrams(group, 0)


def test_edit_distance_against_the_textbook_table():
    random = np.random.default_rng(0)
    for _ in range(60):
        a, b = (random.integers(4, size=random.integers(9)).tolist() for _ in range(2))
        assert diversity.edit_distance(a, b) == _textbook_distance(a, b)
    assert diversity.edit_distance("kitten", "sitting") == 3


def test_mean_pairwise_distance():
    assert diversity.mean_pairwise_distance([[1, 2], [1, 2], [1, 2]]) == 0.0
    assert diversity.mean_pairwise_distance([[1, 2], [3, 4]]) == 1.0
    assert diversity.mean_pairwise_distance([[1, 2, 3, 4], [1, 2], [1, 2]]) == pytest.approx(
        (0.5 + 0.5 + 0) / 3
    )
    assert diversity.mean_pairwise_distance([[1, 2], [1, 2, 3, 4]]) == 0.5
    assert diversity.mean_pairwise_distance([[], []]) == 0.0
    assert math.isnan(diversity.mean_pairwise_distance([[1]]))
    assert diversity.mean_pairwise_distance([[1, 2], [1, 3]], max_tokens=1) == 0.0


def test_group_diversity_has_every_metric():
    metrics = diversity.group_diversity([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]], ["7", None, "7"])
    assert metrics == {
        "distinct_1": 5 / 12,
        "distinct_2": 4 / 9,
        "distinct_4": 2 / 3,
        "edit_distance": pytest.approx((0.25 + 0 + 0.25) / 3),
        "answers": 1.0,
    }
    with pytest.raises(ValueError, match="got 1 answers"):
        diversity.group_diversity([[1], [2]], ["7"])
