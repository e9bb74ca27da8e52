"""The update: the same loss and gradients however rows are packed, cut, recomputed or spread over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import learner_case as case
import numpy as np
import optax
import pytest

from ngrpo_jax.algo.mixture import Mixing, embed
from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.optimizer import learning_rate, make_optimizer
from ngrpo_jax.model import decoder
from ngrpo_jax.rollout import engine
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import OptimizerSettings


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 4, 2), (4, 1, 2)])
def test_eight_devices_equal_one(shape):
    grads, metrics, *_ = case.step_gradients(meshes.make_mesh(*shape), rows=8, share_prompts=True)
    case.assert_same_step(grads, metrics)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize(("row_tokens", "rows"), [(64, 1), (64, 2), (128, 2), (40, 8)])
def test_packing_and_microbatches_do_not_change_the_loss(row_tokens, rows, share_prompts):
    grads, metrics, _, batch = case.step_gradients(
        row_tokens=row_tokens, rows=rows, share_prompts=share_prompts
    )
    assert share_prompts == any(part.prefix_ids_RT.any() for part in batch)
    case.assert_same_step(grads, metrics)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("attention", ["chunked", "plain"])
def test_gaps_between_the_segments_of_a_row_do_not_change_the_loss(monkeypatch, attention, share_prompts):
    monkeypatch.setattr(packing, "BLOCK", 16)
    grads, metrics, _, batch = case.step_gradients(
        row_tokens=100, attention=attention, share_prompts=share_prompts
    )
    ids_RT = np.concatenate([part.segment_ids_RT for part in batch])
    followed = np.cumsum(ids_RT[:, ::-1], axis=1)[:, ::-1] > 0
    assert np.sum((ids_RT == 0) & followed) > 10, "padding with a segment behind it"
    case.assert_same_step(grads, metrics)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_plain_attention_gives_the_same_on_packed_rows(share_prompts):
    grads, metrics, *_ = case.step_gradients(row_tokens=100, attention="plain", share_prompts=share_prompts)
    case.assert_same_step(grads, metrics)


@pytest.mark.parametrize(
    ("remat", "unroll"), [("full", False), ("dots", False), ("none", True), ("full", True)]
)
def test_remat_on_equals_off_and_layers_may_be_written_out(remat, unroll):
    grads, metrics, *_ = case.step_gradients(remat=remat, unroll=unroll, logprob_chunk=16)
    case.assert_same_step(grads, metrics)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_microbatches_are_split_into_as_many_calls_as_they_need(monkeypatch, size):
    monkeypatch.setattr(update, "MICROBATCHES_PER_CALL", size)
    grads, metrics, calls, batch = case.step_gradients(row_tokens=30, rows=1)
    counts = [int(call.count) for call in calls]
    assert len(batch) > 4 and sum(counts) == len(batch) and len(counts) == -(-len(batch) // size)
    assert set(counts[:-1]) == {size}
    case.assert_same_step(grads, metrics)


def test_microbatches_beyond_the_count_are_not_computed():
    """Three of five count; the others hold NaN, which would be in every sum."""
    programs, shardings, _ = case.make_programs()
    batch = case.pack_batch(case.OBJECTIVE, row_tokens=30, rows=1)
    before, new, ref = (jax.device_put(case.make_params(seed), shardings.params) for seed in (0, 2, 4))
    ((five,),) = update.compute_logprobs(programs, before, ref, [batch[:5]])
    ((three,),) = update.compute_logprobs(programs, before, ref, [batch[:3]])
    expected = update.gradients(programs, new, [three])

    def spoiled(leaf):
        return leaf.at[3:].set(jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[3:])

    rows, _, *logprobs = five
    spoiled_five = update.Microbatches(jax.tree.map(spoiled, rows), three.count, *map(spoiled, logprobs))
    sums = update.gradients(programs, new, [spoiled_five])
    logprobs_MRT = programs.logprobs(before, update.Microbatches(spoiled_five.rows, three.count))
    np.testing.assert_array_equal(logprobs_MRT[:3], three.old_logprobs_MRT[:3])
    for leaf, other in zip(*map(jax.tree.leaves, (sums, expected)), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert not np.asarray(logprobs_MRT[3:]).any() and int(five.count) == 5


def _with_doubled_sampler_logprobs(microbatches):
    rows = microbatches.rows
    return microbatches._replace(rows=rows._replace(sampler_logprobs_RT=2 * rows.sampler_logprobs_RT))


def test_gspo_is_not_changed_by_packing():
    objective = dataclasses.replace(case.OBJECTIVE, algorithm="gspo", clip_low=3e-1, clip_high=4e-1)
    reference = case.step_gradients(row_tokens=30, rows=16, objective=objective)[:2]
    grads, metrics, *_ = case.step_gradients(row_tokens=64, rows=2, objective=objective)
    case.assert_same_step(grads, metrics, reference)


def test_loss_is_equation_13():
    """(13) written out in NumPy from full forward passes, one sequence at a time, mixtures replayed."""
    prompts, written, advantages = case.rollout_batch()
    _, metrics, *_ = case.step_gradients()
    total = 0.0
    for i, prompt in enumerate(prompts):
        logprobs = [_sequence_logprobs(case.make_params(seed), prompt, written, i) for seed in (2, 0, 4)]
        new, old, ref = logprobs
        ratio = np.exp(new - old)
        term = np.minimum(ratio * advantages[i], np.clip(ratio, 0.8, 1.2) * advantages[i])
        if advantages[i] < 0:
            term = np.maximum(term, 3.0 * advantages[i])
        kl = np.exp(ref - new) - (ref - new) - 1
        total -= np.mean(term - 0.05 * kl) / len(prompts)
    assert np.isclose(metrics["learner/loss"], total, rtol=2e-5)


def _sequence_logprobs(params, prompt, written, index):
    """Float64 log-probabilities of a response from the plain forward pass on explicitly mixed embeddings."""
    count = written.lengths_B[index]
    table = np.asarray(params["embed"]["embedding"], np.float64)
    ids, weights = written.mixtures.ids[index, :count], written.mixtures.weights[index, :count]
    mixed = np.einsum("tc,tcd->td", weights.astype(np.float64), table[ids])
    inputs = np.concatenate([table[prompt], mixed[:-1]])
    logits = np.asarray(_logits_of_embedded(params, inputs), np.float64)[len(prompt) - 1 :] / case.TEMPERATURE
    logits -= logits.max(-1, keepdims=True)
    laws = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return laws[np.arange(count), written.tokens_BT[index, :count]]


def _logits_of_embedded(params, inputs_TD):
    """Logits of given embeddings: each becomes the row of a vocabulary made for it.

    Padded to one length, which causality lets, so that one program does for all.
    """
    padded = np.zeros((32, inputs_TD.shape[1]), np.float32)
    padded[: len(inputs_TD)] = inputs_TD
    return _padded_logits(params, padded)[: len(inputs_TD)]


@jax.jit
def _padded_logits(params, inputs_TD):
    own = params | {"embed": {"embedding": inputs_TD}}
    hidden_TD = decoder.hidden_states(own, case.CONFIG, jnp.arange(len(inputs_TD))[None])[0]
    return hidden_TD @ decoder.head(params, case.CONFIG).T


@pytest.mark.parametrize("strategy", ["neighbor", "noise"])
def test_packed_rows_embed_to_the_inputs_of_the_rollout(strategy):
    """Each response token's input, noise included, is the recorded one wherever it is packed."""
    params = case.make_params(0)
    table_VD, prompts = params["embed"]["embedding"], [prompt for prompt in case.PROMPTS for _ in range(2)]
    written = engine.generate(
        params,
        case.CONFIG,
        case.PROMPTS,
        samples=2,
        max_new_tokens=12,
        temperature=case.TEMPERATURE,
        mixing=Mixing(strategy, rate=0.5, k=3) if strategy == "neighbor" else Mixing(strategy),
        stop_ids=(),
    )
    assert written.mixed_BT.any()
    numbers = np.arange(1, 9, dtype=np.float32)  # in the place of advantages: which sequence a token is of
    batch = packing.Batch(prompts, written, numbers)
    rows = packing.pack(batch, np.ones((8, 12), np.float32), packing.RowLayout(48, 1, share_prompts=True))
    packed_RTD, fed_BTD = (
        np.asarray(embed(table_VD, jax.tree.map(jnp.asarray, mixtures)))
        for mixtures in (rows.inputs, written.mixtures)
    )
    for index, number in enumerate(numbers):
        own_RT = rows.response_mask_RT & (rows.advantages_RT == number)
        last_of_prompt, *replayed = packed_RTD[own_RT]
        np.testing.assert_array_equal(last_of_prompt, table_VD[prompts[index][-1]])
        np.testing.assert_array_equal(replayed, fed_BTD[index, : written.lengths_B[index] - 1])


def test_gradient_reaches_the_embedding_rows_of_every_candidate():
    grads, _, _, batch = case.step_gradients()
    moved = np.abs(grads["embed"]["embedding"]).max(axis=1) > 0
    used = np.zeros(96, bool)
    for rows in batch:
        weighty = (rows.inputs.weights > 1e-3) & (rows.segment_ids_RT > 0)[..., None]
        used[rows.inputs.ids[weighty]] = True
    assert used.sum() > 30 and moved[used].all()
    assert not moved[~used].any(), "the head is untied here: rows that no input held have no gradient"


@pytest.mark.parametrize("old", ["learner", "update", "sampler"])
def test_sampler_gap_is_nothing_in_float32_and_is_seen_when_temperatures_differ(old):
    """The parameters are those that wrote the batch, so that all three sources of π_old agree."""
    objective = dataclasses.replace(case.OBJECTIVE, old_logprobs="sampler" if old == "sampler" else "learner")
    grads, gap, calls, _ = case.step_gradients(params_seed=0, old=old, objective=objective)
    assert (calls[0].old_logprobs_MRT is None) == (old == "update")
    assert 0 < gap["gap/max"] <= 1e-4 and gap["gap/mean"] <= gap["gap/max"] and abs(gap["gap/kl"]) < 1e-7
    case.assert_same_step(grads, gap, case.step_gradients(params_seed=0, row_tokens=30, rows=16)[:2])
    programs, shardings, _ = case.make_programs(objective=objective)
    wrong = [_with_doubled_sampler_logprobs(call) for call in calls]
    _, metrics = update.gradients(programs, jax.device_put(case.make_params(0), shardings.params), wrong)
    assert update.batch_metrics([jax.device_get(metrics)])["gap/mean"] > 0.5


def test_offloading_changes_where_arrays_are_and_nothing_else():
    results = []
    _, _, calls, batch = case.step_gradients(rows=4)
    for where in ("none", "both"):
        programs, shardings, optimizer = case.make_programs(offload=where)
        state = update.init_state(jax.device_put(case.make_params(0), shardings.params), optimizer)
        state = state._replace(opt_state=programs.optimizer_offload.to_host(state.opt_state))
        state, (metrics,) = update.update(programs, state, [calls])
        reference = programs.reference_offload.to_host(jax.device_put(case.make_params(4), shardings.params))
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)}
        assert kinds == {"pinned_host" if where == "both" else "device"}
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(reference)}
        assert kinds == {"pinned_host" if where == "both" else "device"}
        (again,) = update.compute_logprobs(programs, state.params, reference, [batch])
        results.append(jax.device_get((state, metrics, [call.ref_logprobs_MRT for call in again])))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(one, other)


def test_update_is_adamw_on_the_clipped_gradient():
    programs, shardings, optimizer = case.make_programs()
    grads, _, calls, _ = case.step_gradients(params_seed=0)
    params = case.make_params(0)
    state = update.init_state(jax.device_put(case.make_params(0), shardings.params), optimizer)
    state, steps = update.update(programs, state, [calls])
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    metrics = update.batch_metrics(jax.device_get(steps))
    assert np.isclose(metrics["learner/grad_norm"], norm, rtol=1e-5)
    moved = jax.tree.map(lambda new, old: new - old, state.params, params)
    assert np.isclose(metrics["learner/update_norm"], optax.tree.norm(moved), rtol=1e-3)
    scale = min(1.0, 1.0 / norm)
    first = jax.tree.map(
        lambda p, g: p - 1e-3 * (scale * g / (np.abs(scale * g) + 1e-8) + 0.01 * p), params, grads
    )
    for new, expected, g in zip(
        *(jax.tree.leaves(tree) for tree in (state.params, first, grads)), strict=True
    ):
        solid = np.abs(g) > 1e-5  # where |g| is near Adam's epsilon the sign alone is noise
        np.testing.assert_allclose(np.asarray(new)[solid], np.asarray(expected)[solid], atol=2e-6)


@pytest.mark.parametrize(("leaf", "value"), [("advantages_RT", np.nan), ("weight_RT", np.inf)])
def test_an_update_that_is_not_finite_is_skipped_and_leaves_no_trace(leaf, value):
    programs, shardings, optimizer = case.make_programs()
    _, _, calls, _ = case.step_gradients(params_seed=0)
    start = jax.device_put(case.make_params(0), shardings.params)
    state, _ = update.update(programs, update.init_state(start, optimizer), [calls])
    before = jax.device_get(state)
    rows = calls[0].rows
    bad_MRT = jnp.where(rows.weight_RT > 0, value, getattr(rows, leaf))
    bad_MRT = jax.device_put(bad_MRT, rows.weight_RT.sharding)
    bad = calls[0]._replace(rows=rows._replace(**{leaf: bad_MRT}))
    state, steps = update.update(programs, state, [[bad, *calls[1:]]])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    assert update.batch_metrics(jax.device_get(steps))["learner/skipped"] == 1
    state, steps = update.update(programs, state, [calls])
    assert update.batch_metrics(jax.device_get(steps))["learner/skipped"] == 0
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(before.params)[0])


def test_no_reference_logprobs_without_a_kl_term():
    objective = dataclasses.replace(case.OBJECTIVE, kl_coef=0.0)
    _, metrics, calls, _ = case.step_gradients(objective=objective)
    assert all(call.ref_logprobs_MRT is None for call in calls) and "learner/kl" not in metrics


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]),
        ("cosine", [0.5, 1, *(0.5 + 0.5 * np.cos(np.pi * np.arange(9) / 8)), 0]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0, 0]),
    ],
)
def test_rates_follow_their_schedule(schedule, expected):
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=2, schedule=schedule, decay_steps=10)
    found = [float(learning_rate(settings)(step)) / 2.0 for step in range(12)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_optimizer_warms_up_linearly():
    optimizer = make_optimizer(dataclasses.replace(case.OPTIMIZER, warmup_steps=4))
    params = {"x": jnp.ones(3)}
    state = optimizer.init(params)
    sizes = []
    for _ in range(6):
        updates, state = optimizer.update({"x": jnp.ones(3)}, state, {"x": jnp.zeros(3)})
        sizes.append(float(optax.tree.norm(updates)))
    np.testing.assert_allclose(np.array(sizes) / sizes[-1], [0.25, 0.5, 0.75, 1, 1, 1], atol=1e-3)
