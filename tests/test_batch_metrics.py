"""Metrics of the optimiser steps of a batch -> the numbers of its row."""

import numpy as np
import pytest

from ngrpo_jax.algo.metrics import Max, Mean, Min, Sum
from ngrpo_jax.learner import update


def _step(weight, kl, ratios, loss, norm, gap=(0.8, 4.0)):
    least, most = ratios
    learner = {"kl": Mean(kl, weight), "ratio_min": Min(least), "ratio_max": Max(most)}
    learner |= {"loss": Sum(loss, weight), "grad_norm": Mean(norm, 1.0)}
    return {"learner": learner, "gap": {"mean": Mean(*gap)}}


def test_metrics_of_a_batch_are_means_over_weight_and_extremes_over_steps():
    steps = [_step(0.5, 0.1, (0.5, 2.0), 3.0, 1.0), _step(1.0, 0.4, (0.7, 1.5), 5.0, 3.0, (0.8, 2.0))]
    expected = {"kl": 0.3, "ratio_max": 2.0, "ratio_min": 0.5, "grad_norm": 2.0, "loss": 4.0}
    expected = {f"learner/{name}": x for name, x in expected.items()} | {"gap/mean": 0.3}
    assert update.batch_metrics(steps) == pytest.approx(expected)


def test_a_step_without_any_weight_is_in_no_mean_over_tokens():
    full = _step(1.0, 0.3, (0.5, 2.0), 2.0, 3.0)
    empty = _step(0.0, 0.0, (np.inf, -np.inf), 0.0, 1.0, gap=(0.0, 0.0))
    tokens = {"learner/kl": 0.3, "learner/loss": 2.0, "gap/mean": 0.2}
    others = {"learner/ratio_min": 0.5, "learner/ratio_max": 2.0, "learner/grad_norm": 2.0}
    for steps in ([full, empty], [empty, full]):
        assert update.batch_metrics(steps) == pytest.approx(tokens | others)
    of_none = update.batch_metrics([empty])
    assert all(np.isnan(of_none[name]) for name in tokens)
    assert of_none["learner/grad_norm"] == 1


def test_gap_of_the_first_step_alone():
    gap = {"mean": Mean(0.2, 2.0), "max": Max(0.15)}
    step = {"learner": {"loss": Sum(1.0, 1.0)}, "gap": gap}
    later = {"learner": {"loss": Sum(3.0, 1.0)}, "gap": {"mean": Mean(2.0, 2.0), "max": Max(1.5)}}
    both, first = update.batch_metrics([step, later]), update.batch_metrics([step, later], gap_of_first=True)
    assert both["gap/max"] == 1.5 and both["gap/mean"] == pytest.approx(0.55)
    assert first["gap/max"] == 0.15 and first["gap/mean"] == pytest.approx(0.1)
    assert first["learner/loss"] == 2.0
