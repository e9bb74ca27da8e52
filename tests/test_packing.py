"""Packing and weights: each token's share of the loss, and what stands where in a row."""

import dataclasses

import numpy as np
import pytest

from configs import base
from ngrpo_jax.algo.mixture import Mixture, Noise
from ngrpo_jax.learner import bins, packing
from ngrpo_jax.learner.advantages import token_weights
from ngrpo_jax.model.attention import BLOCK
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import resolve

OBJECTIVE = resolve(base.get_config()).objective
PROMPTS = [[5, 6], [7, 8, 9], [5, 6], [4]]
LENGTHS = np.array([3, 1, 5, 2], np.int32)


def _trajectories(candidates=2, length=6):
    """Four responses of tokens 10.., every second position mixed from two candidates."""
    made = Trajectories.empty(len(LENGTHS), length, candidates)
    for row, count in enumerate(LENGTHS):
        made.lengths_B[row] = count
        for t in range(count):
            made.tokens_BT[row, t] = 10 * (row + 1) + t
            made.mixtures.ids[row, t] = [10 * (row + 1) + t, 3]
            made.mixed_BT[row, t] = t % 2 == 1
            made.mixtures.weights[row, t] = [0.75, 0.25] if t % 2 else [1.0, 0.0]
            made.logprobs_BT[row, t] = -0.1 * (t + 1)
    return made


def _weights(aggregate, loss_on_mixed=True):
    objective = dataclasses.replace(OBJECTIVE, aggregate=aggregate, loss_on_mixed=loss_on_mixed)
    return token_weights(_trajectories(), objective)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_weights_are_the_aggregation(aggregate):
    """Σ weight · x against the mean written out: of responses' means, over tokens, by a constant."""
    x_BT = np.random.default_rng(0).normal(size=(4, 6))
    parts = [x_BT[i, :n] for i, n in enumerate(LENGTHS)]
    expected = {
        "sequence": np.mean([part.mean() for part in parts]),
        "token": np.concatenate(parts).mean(),
        "constant": sum(part.sum() for part in parts) / (4 * 6),
    }[aggregate]
    assert np.isclose((_weights(aggregate) * x_BT).sum(), expected, rtol=1e-6)


def test_loss_on_mixed_false_gives_mixed_positions_weight_zero_and_leaves_the_others():
    mixed = _trajectories().mixed_BT
    with_all, without = _weights("sequence"), _weights("sequence", loss_on_mixed=False)
    assert mixed.any() and not without[mixed].any()
    np.testing.assert_array_equal(without[~mixed], with_all[~mixed])


def test_a_row_predicts_each_response_token_from_what_stood_before_it():
    made = _trajectories()
    batch = packing.Batch(PROMPTS, made, np.array([1.0, -2.0, 3.0, -4.0]))
    rows = packing.pack(batch, _weights("sequence"), packing.RowLayout(7, 2))
    assert rows.targets_RT.shape == (4, 7), "first fit: 6 | 4 + 3 | 2 -> 3 rows, then up to a multiple of 2"
    seen = []
    for row in range(4):
        for segment in range(1, rows.segment_ids_RT[row].max() + 1):
            places = np.flatnonzero(rows.segment_ids_RT[row] == segment)
            np.testing.assert_array_equal(rows.positions_RT[row, places], np.arange(len(places)))
            answer = places[rows.response_mask_RT[row, places]]
            index = int(rows.targets_RT[row, answer[0]]) // 10 - 1
            seen.append(index)
            prompt, count = PROMPTS[index], LENGTHS[index]
            assert len(places) == len(prompt) + count - 1
            np.testing.assert_array_equal(rows.inputs.ids[row, places[: len(prompt)], 0], prompt)
            np.testing.assert_array_equal(rows.targets_RT[row, answer], made.response(index))
            replayed = places[len(prompt) :]
            np.testing.assert_array_equal(
                rows.inputs.ids[row, replayed], made.mixtures.ids[index, : count - 1]
            )
            np.testing.assert_array_equal(
                rows.inputs.weights[row, replayed], made.mixtures.weights[index, : count - 1]
            )
            np.testing.assert_array_equal(rows.advantages_RT[row, places], [1.0, -2.0, 3.0, -4.0][index])
            np.testing.assert_allclose(rows.sampler_logprobs_RT[row, answer], made.logprobs_BT[index, :count])
            np.testing.assert_allclose(rows.weight_RT[row, answer], 1 / (4 * count), rtol=1e-6)
    assert sorted(seen) == [0, 1, 2, 3]
    padding = rows.segment_ids_RT == 0
    assert not rows.weight_RT[padding].any() and not rows.response_mask_RT[padding].any()
    np.testing.assert_allclose(rows.inputs.weights.sum(-1), 1.0)
    assert np.isclose(rows.weight_RT.sum(), 1.0)


def test_first_fit_fills_rows_and_loses_no_sequence():
    lengths = np.random.default_rng(1).integers(1, 100, size=200).tolist()
    found = bins.first_fit(lengths, 128)
    assert sorted(i for members in found for i in members) == list(range(200))
    assert all(sum(lengths[i] for i in members) <= 128 for members in found)
    assert sum(lengths) / (128 * len(found)) > 0.9


def test_mini_batches_keep_prompts_together_and_count_their_own_weights():
    made = _trajectories()
    objective = dataclasses.replace(OBJECTIVE, aggregate="token")
    batch = packing.Batch(PROMPTS, made, np.ones(4))
    batches = packing.mini_batches(batch, objective, packing.RowLayout(8, 1), count=2)
    assert len(batches) == 2
    for part, batch in enumerate(batches):
        tokens = np.concatenate([rows.targets_RT[rows.response_mask_RT] for rows in batch])
        expected = np.concatenate([made.response(2 * part), made.response(2 * part + 1)])
        assert sorted(tokens) == sorted(expected)
        assert np.isclose(sum(rows.weight_RT.sum() for rows in batch), 1.0)
        assert all(rows.targets_RT.shape == (1, 8) for rows in batch)
    assert isinstance(batches[0][0].inputs, Mixture)
    real = sum(len(prompt) + count - 1 for prompt, count in zip(PROMPTS, LENGTHS, strict=True))
    assert np.isclose(packing.fill_fraction(batches), real / (8 * sum(map(len, batches))))


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(
        ValueError, match=r"sequence 2 takes 6 positions, more than a row of train.row_tokens"
    ):
        batch = packing.Batch(PROMPTS, _trajectories(), np.ones(4))
        packing.pack(batch, _weights("token"), packing.RowLayout(5, 1))


def test_a_shared_prompt_stands_once_and_each_response_begins_with_its_last_token():
    made = _trajectories()
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [8, 9]]
    batch = packing.Batch(prompts, made, np.array([1.0, 2.0, 3.0, 4.0]))
    rows = packing.pack(batch, _weights("sequence"), packing.RowLayout(16, 1, share_prompts=True))
    assert rows.targets_RT.shape == (1, 16)
    # Prompt 5 6 once, then responses 2 (5 tokens) and 0 (3), each after 7; prompt 8 once, then 3 and 1.
    np.testing.assert_array_equal(
        rows.segment_ids_RT[0], [1] * 2 + [2] * 5 + [3] * 3 + [4] + [5] * 2 + [6] + [0] * 2
    )
    np.testing.assert_array_equal(rows.prefix_ids_RT[0], [0] * 2 + [1] * 8 + [0] + [4] * 3 + [0] * 2)
    np.testing.assert_array_equal(
        rows.inputs.ids[0, :14, 0], [5, 6, 7, 30, 31, 32, 33, 7, 10, 11, 8, 9, 40, 9]
    )
    np.testing.assert_array_equal(rows.positions_RT[0, :14], [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 0, 1, 2, 1])
    np.testing.assert_array_equal(
        rows.targets_RT[0, rows.response_mask_RT[0]], [30, 31, 32, 33, 34, 10, 11, 12, 40, 41, 20]
    )
    np.testing.assert_array_equal(
        rows.advantages_RT[0, rows.response_mask_RT[0]], [3] * 5 + [1] * 3 + [4] * 2 + [2]
    )
    assert np.isclose(rows.weight_RT.sum(), 1.0) and not rows.weight_RT[~rows.response_mask_RT].any()
    assert not rows.advantages_RT[~rows.response_mask_RT].any(), "a shared prompt is no sequence's own"


@pytest.mark.parametrize("row_tokens", [575, 576, 640, 900])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_segments_start_with_a_block_of_attention_as_long_as_the_row_has_room(share_prompts, row_tokens):
    made = Trajectories.empty(4, 128, 1)
    made.lengths_B[:] = 128 if share_prompts else [60, 65, 100, 60]
    made.tokens_BT[:] = 1000 * np.arange(4)[:, None] + np.arange(128)
    prompts = [list(range(10, 74))] * 4
    batch = packing.Batch(prompts, made, np.zeros(4))
    rows = packing.pack(batch, np.ones((4, 128), np.float32), packing.RowLayout(row_tokens, 1, share_prompts))
    (ids,) = rows.segment_ids_RT
    numbers = range(1, ids.max() + 1)
    lengths = [int(np.sum(ids == number)) for number in numbers]
    assert sum(lengths) == (63 + 4 * 128 if share_prompts else 285 + 4 * 63)
    assert (np.diff(ids[ids > 0]) >= 0).all() and not ids[np.flatnonzero(ids)[-1] + 1 :].any()
    room, end = row_tokens - sum(lengths), 0
    for number, length in zip(numbers, lengths, strict=True):
        start = int(np.flatnonzero(ids == number)[0])
        assert (ids[start : start + length] == number).all(), "a segment stands in one piece"
        assert start == end or start % BLOCK == 0
        assert start % BLOCK == 0 or -end % BLOCK > room, "there was room for the gap"
        room, end = room - (start - end), start + length
    assert sorted(rows.targets_RT[rows.response_mask_RT]) == sorted(
        token for i in range(4) for token in made.response(i)
    )


def test_a_group_too_long_for_one_row_has_its_prompt_in_each_that_it_needs():
    found = bins.first_fit_groups([0, 0, 0, 1], [10, 10, 10, 3], [20, 20, 20, 4], capacity=50)
    assert found == [[0, 1], [2, 3]]


def _long_tail():
    """64 prompts of 64 tokens × 4 responses: log-normal, median 60, 95th percentile 400, cap 512."""
    rng = np.random.default_rng(0)
    drawn = 60 * np.exp(np.log(400 / 60) / 1.645 * rng.normal(size=256))
    made = Trajectories.empty(256, 512, 1)
    made.lengths_B[:] = np.clip(np.round(drawn), 1, 512)
    return [[prompt] * 64 for prompt in range(64) for _ in range(4)], made


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_rows_of_the_default_length_are_filled_to_92_percent_by_a_long_tail(count, share_prompts):
    prompts, made = _long_tail()
    batch = packing.Batch(prompts, made, np.zeros(256))
    layout = packing.RowLayout(64 + 512, 1, share_prompts)
    batches = packing.mini_batches(batch, OBJECTIVE, layout, count=count)
    responses = sum(int(rows.response_mask_RT.sum()) for batch in batches for rows in batch)
    assert responses == made.lengths_B.sum()
    assert packing.fill_fraction(batches) >= 0.92


def test_whatever_a_mixture_carries_is_packed_with_its_token():
    made = _trajectories()
    place = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    keys = np.stack([place, place + 100], axis=-1).astype(np.uint32)
    noise = Noise(keys, place, place.astype(np.float32))
    made = made._replace(mixtures=made.mixtures._replace(noise=noise))
    for share_prompts in (False, True):
        batch = packing.Batch(PROMPTS, made, np.zeros(4))
        rows = packing.pack(batch, _weights("token"), packing.RowLayout(8, 1, share_prompts))
        packed = rows.inputs.noise
        assert packed.key_data.dtype == np.uint32 and packed.scale.dtype == np.float32
        # A response's first input is the prompt's last token, which has no noise.
        expected = np.concatenate([place[i, : n - 1] for i, n in enumerate(LENGTHS)])
        held = packed.scale != 0
        assert sorted(packed.position[held]) == sorted(expected[expected > 0])
        np.testing.assert_array_equal(packed.key_data[held][:, 1], packed.position[held] + 100)
        np.testing.assert_array_equal(packing.slice_rows(rows, 1, 1).inputs.noise.scale, packed.scale[1:2])
