"""Advantages: what the settings do to rewards, and which responses take part in the update."""

import concurrent.futures
import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest

from configs import base
from ngrpo_jax.algo.objectives import group_advantages
from ngrpo_jax.learner import advantages
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import resolve

OBJECTIVE = resolve(base.get_config()).objective
REWARDS = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0]], np.float32)
LENGTHS = np.array([3, 10, 8, 2, 10, 5, 4, 4, 10])
STOPPED = np.array([1, 0, 1, 1, 0, 1, 1, 1, 1], bool)


NONE = {"responses/nonfinite": 0}


def _trajectories(start=0, stop=9):
    made = Trajectories.empty(9, 10, 2)._replace(lengths_B=LENGTHS, stopped_B=STOPPED)
    return made.part(start, stop)


def _compute(groups=slice(0, 3), allgather=advantages.single_host, **changes):
    part = _trajectories(3 * groups.start, 3 * groups.stop)
    objective = dataclasses.replace(OBJECTIVE, **changes)
    return advantages.compute_advantages(REWARDS[groups], part, objective, allgather)


@pytest.mark.parametrize("scale", [True, False])
def test_by_default_all_count_and_advantages_are_eq12(scale):
    computed = _compute(scale_by_std=scale)
    np.testing.assert_array_equal(computed.advantages_PG, group_advantages(REWARDS, scale_by_std=scale))
    assert computed.included_PG.all() and computed.metrics == NONE


def test_groups_without_variance_can_be_left_out_and_are_counted():
    computed = _compute(skip_zero_variance=True)
    np.testing.assert_array_equal(computed.included_PG, [[True] * 3, [False] * 3, [False] * 3])
    assert computed.metrics == NONE | {"groups/left_out": 2, "responses/left_out": 6}


def test_responses_with_logits_that_are_not_finite_are_left_out_and_counted():
    part = _trajectories()
    part.nonfinite_B[[1, 5]] = True
    part.lengths_B[5] = 0
    computed = advantages.compute_advantages(REWARDS, part, OBJECTIVE)
    np.testing.assert_array_equal(np.flatnonzero(~computed.included_PG.reshape(-1)), [1, 5])
    assert computed.metrics == {"responses/nonfinite": 2}
    for aggregate in ("sequence", "token", "constant"):
        objective = dataclasses.replace(OBJECTIVE, aggregate=aggregate)
        weight_BT = advantages.token_weights(part, objective, computed.included_PG.reshape(-1))
        assert np.isfinite(weight_BT).all() and not weight_BT[[1, 5]].any()


def test_responses_cut_off_can_be_left_out():
    computed = _compute(overlong="mask")
    np.testing.assert_array_equal(computed.included_PG.reshape(-1), STOPPED)
    np.testing.assert_array_equal(computed.advantages_PG, group_advantages(REWARDS))
    assert computed.metrics == NONE | {"responses/left_out": 2}


def test_a_penalty_for_length_changes_rewards_before_groups_are_compared():
    penalize = dict(overlong="penalize", overlong_penalty=0.5, overlong_interval=4)
    computed = _compute(**penalize, skip_zero_variance=True)
    penalty = 0.5 * np.array([0, 1, 0.5, 0, 1, 0, 0, 0, 1]).reshape(3, 3)
    np.testing.assert_allclose(computed.advantages_PG, group_advantages(REWARDS - penalty), rtol=1e-5)
    assert computed.included_PG.all(), "each group has variance now"
    np.testing.assert_allclose(computed.metrics["reward/overlong_penalty"], penalty.mean(), rtol=1e-6)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_what_is_left_out_has_no_weight_and_the_rest_is_the_mean_of_the_rest(aggregate):
    objective, made = dataclasses.replace(OBJECTIVE, aggregate=aggregate), _trajectories()
    included = np.arange(9) % 3 != 1
    weights = advantages.token_weights(made, objective, included)
    assert not weights[~included].any()
    rest = jax.tree.map(lambda leaf: leaf[included], made)
    np.testing.assert_array_equal(weights[included], advantages.token_weights(rest, objective))
    assert not advantages.token_weights(made, objective, np.zeros(9, bool)).any()


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_hosts_weigh_tokens_by_what_all_of_them_have_kept(aggregate):
    included, made = np.arange(9) % 4 != 1, _trajectories()
    objective = dataclasses.replace(OBJECTIVE, aggregate=aggregate)
    hosts = [slice(0, 3), slice(3, 9)]

    def weights(host, allgather):
        part = made.part(host.start, host.stop)
        return advantages.token_weights(part, objective, included[host], allgather)

    shares = _on_hosts([functools.partial(weights, host) for host in hosts])
    whole = advantages.token_weights(made, objective, included)
    np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_metrics_are_those_of_all_hosts():
    changes = dict(overlong="penalize", overlong_penalty=0.5, overlong_interval=0, skip_zero_variance=True)

    def metrics(group, allgather):
        return _compute(slice(group, group + 1), allgather, **changes).metrics

    hosts = _on_hosts([functools.partial(metrics, group) for group in range(3)])
    whole = _compute(**changes).metrics
    assert whole["groups/left_out"] > 0 < whole["reward/overlong_penalty"]
    for of_host in hosts:
        assert of_host == pytest.approx(whole, rel=1e-6)


def _on_hosts(functions):
    """The results of functions of `allgather` that run at the same time, one a host."""
    barrier, given = threading.Barrier(len(functions), timeout=60), [None] * len(functions)

    def allgather(index, value):
        given[index] = value
        barrier.wait()
        gathered = list(given)
        barrier.wait()
        return gathered

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        calls = [
            pool.submit(function, functools.partial(allgather, index))
            for index, function in enumerate(functions)
        ]
        return [call.result() for call in calls]
