"""Credit: what the settings do to rewards, and which responses take part in the update."""

import dataclasses

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


def _assign(groups=slice(0, 3), **changes):
    made = Trajectories.empty(9, 10, 2)._replace(lengths_B=LENGTHS, stopped_B=STOPPED)
    part = made.part(3 * groups.start, 3 * groups.stop)
    return advantages.assign(REWARDS[groups], part, dataclasses.replace(OBJECTIVE, **changes), 10)


@pytest.mark.parametrize("scale", [True, False])
def test_by_default_all_count_and_advantages_are_eq12(scale):
    earned = _assign(scale_by_std=scale)
    np.testing.assert_array_equal(earned.advantages_PG, group_advantages(REWARDS, scale_by_std=scale))
    assert earned.counted_PG.all() and earned.figures == {}


def test_groups_without_variance_can_be_left_out_and_are_counted():
    earned = _assign(skip_zero_variance=True)
    np.testing.assert_array_equal(earned.counted_PG, [[True] * 3, [False] * 3, [False] * 3])
    assert earned.figures == {"groups/left_out": 2, "responses/left_out": 6}


def test_responses_cut_off_can_be_left_out():
    earned = _assign(overlong="mask")
    np.testing.assert_array_equal(earned.counted_PG.reshape(-1), STOPPED)
    np.testing.assert_array_equal(earned.advantages_PG, group_advantages(REWARDS))
    assert earned.figures == {"responses/left_out": 2}


def test_a_penalty_for_length_changes_rewards_before_groups_are_compared():
    earned = _assign(overlong="penalize", overlong_penalty=0.5, overlong_interval=4, skip_zero_variance=True)
    penalty = 0.5 * np.array([0, 1, 0.5, 0, 1, 0, 0, 0, 1]).reshape(3, 3)
    np.testing.assert_allclose(earned.advantages_PG, group_advantages(REWARDS - penalty), rtol=1e-5)
    assert earned.counted_PG.all(), "each group has variance now"
    np.testing.assert_allclose(earned.figures["reward/overlong_penalty"], penalty.mean(), rtol=1e-6)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_what_is_left_out_has_no_weight_and_the_rest_is_the_mean_of_the_rest(aggregate):
    mixed = np.zeros((9, 10), bool)
    options = dict(aggregate=aggregate, loss_on_mixed=True, max_new_tokens=10)
    counted = np.arange(9) % 3 != 1
    weights = advantages.token_weights(LENGTHS, mixed, counted_B=counted, **options)
    assert not weights[~counted].any()
    np.testing.assert_array_equal(
        weights[counted], advantages.token_weights(LENGTHS[counted], mixed[counted], **options)
    )
    assert not advantages.token_weights(LENGTHS, mixed, counted_B=np.zeros(9, bool), **options).any()


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_hosts_weigh_tokens_by_what_all_of_them_have_kept(aggregate):
    counted, mixed = np.arange(9) % 4 != 1, np.zeros((9, 10), bool)
    options = dict(aggregate=aggregate, loss_on_mixed=True, max_new_tokens=10)
    hosts = [slice(0, 3), slice(3, 9)]
    said = [[int(counted[host].sum()), int(LENGTHS[host][counted[host]].sum())] for host in hosts]

    def share(host, own):
        def gather(value):
            assert value == own
            return said

        return advantages.token_weights(
            LENGTHS[host], mixed[host], counted_B=counted[host], gather=gather, **options
        )

    shares = [share(host, own) for host, own in zip(hosts, said, strict=True)]
    whole = advantages.token_weights(LENGTHS, mixed, counted_B=counted, **options)
    np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_figures_of_hosts_join_to_those_of_the_whole_step():
    changes = dict(overlong="penalize", overlong_penalty=0.5, overlong_interval=0, skip_zero_variance=True)
    parts = [_assign(slice(group, group + 1), **changes).figures for group in range(3)]
    joined, whole = advantages.join_figures(parts), _assign(**changes).figures
    assert joined.keys() == whole.keys() and whole["groups/left_out"] > 0 < whole["reward/overlong_penalty"]
    for name, value in whole.items():
        assert joined[name] == pytest.approx(value, rel=1e-6), name
