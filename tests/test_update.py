"""The update: the same loss and gradients however rows are packed, cut, recomputed or spread over devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from ngrpo_jax.algo.metrics import Max, Mean, Min, Sum
from ngrpo_jax.algo.mixture import Mixing, embed
from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.loss import ForwardOptions, row_loss
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.model import attention as attentions
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import engine
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import OptimizerSettings, resolve

CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
OBJECTIVE = dataclasses.replace(resolve(base.get_config()).objective, kl_coef=0.05)
OPTIMIZER = OptimizerSettings(1e-3, 0, 0.9, 0.999, 1e-8, 0.01, 1.0)
TEMPERATURE = 0.8
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [20] * 11, [31, 2]]


def _params(seed, config=CONFIG):
    params = decoder.init(jax.random.key(seed), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@functools.cache
def _batch():
    """A rollout with mixtures, and advantages of both signs: (prompts, trajectories, advantages)."""
    written = engine.generate(
        _params(0),
        CONFIG,
        PROMPTS,
        samples=4,
        max_new_tokens=20,
        temperature=TEMPERATURE,
        mixing=Mixing(rate=0.5, k=3),
        stop_ids=tuple(range(0, 96, 7)),
        seed=1,
    )
    assert written.mixed_BT.sum() > 10
    advantages = np.random.default_rng(0).normal(size=16).astype(np.float32)
    return [prompt for prompt in PROMPTS for _ in range(4)], written, advantages


def _programs(
    mesh=None,
    remat="none",
    objective=OBJECTIVE,
    logprob_chunk=64,
    attention="chunked",
    unroll=False,
    config=CONFIG,
    **options,
):
    mesh = mesh or meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = make_optimizer(OPTIMIZER)
    shapes = jax.eval_shape(lambda: update.init_state(decoder.init(jax.random.key(0), config), optimizer))
    shardings = meshes.state_shardings(mesh, shapes)
    attend = attentions.make(attention, mesh, block=16)
    programs = update.compile_programs(
        ForwardOptions(
            config, TEMPERATURE, remat, logprob_chunk, attend, unroll, meshes.lookup_sharding(mesh)
        ),
        objective,
        optimizer,
        state_shardings=shardings,
        rows_sharding=meshes.rows_sharding(mesh),
        **options,
    )
    return programs, shardings, optimizer


def _packed(objective, row_tokens=64, rows=4, share_prompts=False):
    layout = packing.RowLayout(row_tokens, rows, share_prompts)
    (batch,) = packing.mini_batches(packing.Batch(*_batch()), objective, layout, count=1)
    return batch


def _gradients(
    mesh=None,
    *,
    row_tokens=64,
    rows=4,
    params_seed=2,
    objective=OBJECTIVE,
    share_prompts=False,
    old="learner",
    **options,
):
    """Gradients and metrics of one optimiser step by parameters that differ from old and reference ones."""
    programs, shardings, _ = _programs(mesh, objective=objective, **options)
    batch = _packed(objective, row_tokens, rows, share_prompts)
    before, new, ref = (jax.device_put(_params(seed), shardings.params) for seed in (0, params_seed, 4))
    reference = ref if objective.kl_coef else None
    (microbatches,) = update.compute_logprobs(programs, before, reference, [batch], old=old)
    sums = jax.device_get(update.gradients(programs, new, microbatches))
    return sums.gradient, update.batch_metrics([sums.metrics]), microbatches, batch


@functools.cache
def _reference():
    """The step with every sequence in a row of its own, one device, plain attention, nothing recomputed."""
    return _gradients(row_tokens=30, rows=16, attention="plain")[:2]


def _assert_same(grads, metrics, reference=None):
    expected, others = reference or _reference()
    loss = others["learner/loss"]
    assert abs(metrics["learner/loss"] - loss) <= 1e-6 * abs(loss)
    whole = np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in jax.tree.leaves(expected)))
    assert whole > 1e-3
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        limit = 1e-5 * max(np.linalg.norm(other), 1e-3 * whole)
        assert np.linalg.norm(leaf - other) <= limit, jax.tree_util.keystr(path)


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 4, 2), (4, 1, 2)])
def test_eight_devices_equal_one(shape):
    grads, metrics, *_ = _gradients(meshes.make_mesh(*shape), rows=8, share_prompts=True)
    _assert_same(grads, metrics)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize(("row_tokens", "rows"), [(64, 1), (64, 2), (128, 2), (40, 8)])
def test_packing_and_microbatches_do_not_change_the_loss(row_tokens, rows, share_prompts):
    grads, metrics, _, batch = _gradients(row_tokens=row_tokens, rows=rows, share_prompts=share_prompts)
    assert share_prompts == any(part.prefix_ids_RT.any() for part in batch)
    _assert_same(grads, metrics)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("attention", ["chunked", "plain"])
def test_gaps_between_the_segments_of_a_row_do_not_change_the_loss(monkeypatch, attention, share_prompts):
    monkeypatch.setattr(packing, "BLOCK", 16)
    grads, metrics, _, batch = _gradients(row_tokens=100, attention=attention, share_prompts=share_prompts)
    ids_RT = np.concatenate([part.segment_ids_RT for part in batch])
    followed = np.cumsum(ids_RT[:, ::-1], axis=1)[:, ::-1] > 0
    assert np.sum((ids_RT == 0) & followed) > 10, "padding with a segment behind it"
    _assert_same(grads, metrics)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_plain_attention_gives_the_same_on_packed_rows(share_prompts):
    grads, metrics, *_ = _gradients(row_tokens=100, attention="plain", share_prompts=share_prompts)
    _assert_same(grads, metrics)


@pytest.mark.parametrize(
    ("remat", "unroll"), [("full", False), ("dots", False), ("none", True), ("full", True)]
)
def test_remat_on_equals_off_and_layers_may_be_written_out(remat, unroll):
    grads, metrics, *_ = _gradients(remat=remat, unroll=unroll, logprob_chunk=16)
    _assert_same(grads, metrics)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_microbatches_are_split_into_as_many_calls_as_they_need(monkeypatch, size):
    monkeypatch.setattr(update, "MICROBATCHES_PER_CALL", size)
    grads, metrics, calls, batch = _gradients(row_tokens=30, rows=1)
    counts = [int(call.count) for call in calls]
    assert counts == {1: [1, 1, 1, 1, 1], 2: [2, 2, 1], 3: [3, 2]}[size] and len(batch) == 5
    _assert_same(grads, metrics)


def test_microbatches_beyond_the_count_are_not_computed():
    """Three of five count; the others hold NaN, which would be in every sum."""
    programs, shardings, _ = _programs()
    batch = _packed(OBJECTIVE, row_tokens=30, rows=1)
    before, new, ref = (jax.device_put(_params(seed), shardings.params) for seed in (0, 2, 4))
    ((five,),) = update.compute_logprobs(programs, before, ref, [batch])
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
    objective = dataclasses.replace(OBJECTIVE, algorithm="gspo", clip_low=3e-1, clip_high=4e-1)
    reference = _gradients(row_tokens=30, rows=16, objective=objective)[:2]
    grads, metrics, *_ = _gradients(row_tokens=64, rows=2, objective=objective)
    _assert_same(grads, metrics, reference)


def test_loss_is_equation_13():
    """(13) written out in NumPy from full forward passes, one sequence at a time, mixtures replayed."""
    prompts, written, advantages = _batch()
    _, metrics, *_ = _gradients()
    total = 0.0
    for i, prompt in enumerate(prompts):
        logprobs = [_sequence_logprobs(_params(seed), prompt, written, i) for seed in (2, 0, 4)]
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
    logits = np.asarray(_logits_of_embedded(params, inputs), np.float64)[len(prompt) - 1 :] / TEMPERATURE
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
    hidden_TD = decoder.hidden_states(own, CONFIG, jnp.arange(len(inputs_TD))[None])[0]
    return hidden_TD @ decoder.head(params, CONFIG).T


def test_gradient_reaches_the_embedding_rows_of_every_candidate():
    grads, _, _, batch = _gradients()
    moved = np.abs(grads["embed"]["embedding"]).max(axis=1) > 0
    used = np.zeros(96, bool)
    for rows in batch:
        weighty = (rows.inputs.weights > 1e-3) & (rows.segment_ids_RT > 0)[..., None]
        used[rows.inputs.ids[weighty]] = True
    assert used.sum() > 30 and moved[used].all()
    assert not moved[~used].any(), "the head is untied here: rows that no input held have no gradient"


@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_a_tied_table_gets_the_gradients_of_both_its_uses_as_they_come(algorithm):
    """An untied model of the same rows tells the look-up's and the head's apart; neither is ever turned."""
    objective = dataclasses.replace(OBJECTIVE, algorithm=algorithm, kl_coef=0.0)
    (rows,) = _packed(objective, row_tokens=64, rows=8, share_prompts=True)

    def program(params, config):
        options = ForwardOptions(config, TEMPERATURE, logprob_chunk=16)
        loss = functools.partial(row_loss, objective=objective, options=options)
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return gradient.lower(params, rows, None, None).compile()

    body = {name: leaves for name, leaves in _params(2).items() if name != "head"}
    untied = body | {"head": {"rows": body["embed"]["embedding"]}}
    (_, sums), apart = program(untied, CONFIG)(untied, rows, None, None)
    of_tied = program(body, dataclasses.replace(CONFIG, tie_embeddings=True))
    (_, of_sums), grads = of_tied(body, rows, None, None)
    sums, metrics = (update.batch_metrics([jax.device_get(each)]) for each in (sums, of_sums))
    uses = apart["embed"]["embedding"], apart.pop("head")["rows"]
    assert min(map(jnp.linalg.norm, uses)) > 1e-3
    _assert_same(grads, metrics, (jax.device_get(apart | {"embed": {"embedding": sum(uses)}}), sums))
    text = of_tied.as_text()
    assert "f32[96,32]" in text and "f32[32,96]" not in text


@pytest.mark.parametrize("old", ["learner", "update", "sampler"])
def test_sampler_gap_is_nothing_in_float32_and_is_seen_when_temperatures_differ(old):
    """The parameters are those that wrote the batch, so that all three sources of π_old agree."""
    objective = dataclasses.replace(OBJECTIVE, old_logprobs="sampler" if old == "sampler" else "learner")
    grads, gap, calls, _ = _gradients(params_seed=0, old=old, objective=objective)
    assert (calls[0].old_logprobs_MRT is None) == (old == "update")
    assert 0 < gap["gap/max"] <= 1e-4 and gap["gap/mean"] <= gap["gap/max"] and abs(gap["gap/kl"]) < 1e-7
    _assert_same(grads, gap, _gradients(params_seed=0, row_tokens=30, rows=16)[:2])
    programs, shardings, _ = _programs(objective=objective)
    wrong = [_with_doubled_sampler_logprobs(call) for call in calls]
    _, metrics = update.gradients(programs, jax.device_put(_params(0), shardings.params), wrong)
    assert update.batch_metrics([jax.device_get(metrics)])["gap/mean"] > 0.5


def test_gap_of_the_first_step_alone():
    gap = {"mean": Mean(0.2, 2.0), "max": Max(0.15)}
    step = {"learner": {"loss": Sum(1.0, 1.0)}, "gap": gap}
    later = {"learner": {"loss": Sum(3.0, 1.0)}, "gap": {"mean": Mean(2.0, 2.0), "max": Max(1.5)}}
    both, first = update.batch_metrics([step, later]), update.batch_metrics([step, later], gap_of_first=True)
    assert both["gap/max"] == 1.5 and both["gap/mean"] == pytest.approx(0.55)
    assert first["gap/max"] == 0.15 and first["gap/mean"] == pytest.approx(0.1)
    assert first["learner/loss"] == 2.0


def test_offloading_changes_where_arrays_are_and_nothing_else():
    results = []
    _, _, calls, batch = _gradients(rows=4)
    for where in ("none", "both"):
        programs, shardings, optimizer = _programs(offload=where)
        state = update.init_state(jax.device_put(_params(0), shardings.params), optimizer)
        state = state._replace(opt_state=programs.optimizer_offload.to_host(state.opt_state))
        state, (metrics,) = update.update(programs, state, [calls])
        reference = programs.reference_offload.to_host(jax.device_put(_params(4), shardings.params))
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)}
        assert kinds == {"pinned_host" if where == "both" else "device"}
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(reference)}
        assert kinds == {"pinned_host" if where == "both" else "device"}
        (again,) = update.compute_logprobs(programs, state.params, reference, [batch])
        results.append(jax.device_get((state, metrics, [call.ref_logprobs_MRT for call in again])))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(one, other)


def test_update_is_adamw_on_the_clipped_gradient():
    programs, shardings, optimizer = _programs()
    grads, _, calls, _ = _gradients(params_seed=0)
    params = _params(0)
    state = update.init_state(jax.device_put(_params(0), shardings.params), optimizer)
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


def test_no_reference_logprobs_without_a_kl_term():
    objective = dataclasses.replace(OBJECTIVE, kl_coef=0.0)
    _, metrics, calls, _ = _gradients(objective=objective)
    assert all(call.ref_logprobs_MRT is None for call in calls) and "learner/kl" not in metrics


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


def test_nothing_compiles_after_the_first_step():
    programs, shardings, optimizer = _programs()
    whole = packing.Batch(*_batch())
    start = jax.jit(lambda params: update.init_state(params, optimizer), out_shardings=shardings)
    state = start(_params(0))
    counts = []
    for order in ((0, 16), (4, 12), (2, 6)):
        rows = packing.mini_batches(whole.part(*order), OBJECTIVE, packing.RowLayout(64, 2), count=2)
        batches = update.compute_logprobs(programs, state.params, _params(4), rows)
        state, _ = update.update(programs, state, batches)
        jitted = (programs.logprobs, programs.zeros, programs.accumulate, programs.apply)
        counts.append([program._cache_size() for program in jitted])
    assert counts[1:] == counts[:1] * 2


def test_learner_embedding_equals_the_rollouts():
    """`embed` on packed rows gives what the decode step fed: same ids, same weights, same sum."""
    _, written, _ = _batch()
    table = _params(0)["embed"]["embedding"]
    once = embed(table, jax.tree.map(jnp.asarray, written.mixtures))
    expected = np.einsum("btc,btcd->btd", written.mixtures.weights, np.asarray(table)[written.mixtures.ids])
    np.testing.assert_allclose(once, expected, atol=1e-6)


def test_every_choice_of_the_objective_reaches_the_loss():
    """The loss of a compiled step is put together as the settings say."""
    objective = dataclasses.replace(
        OBJECTIVE, kl_estimator="k2", importance_cap=1.0, entropy_coef=0.1, clip_high=0.4, kl_coef=0.2
    )
    _, metrics, *_ = _gradients(objective=objective)
    metrics = {name.removeprefix("learner/"): x for name, x in metrics.items()}
    assert metrics["importance"] <= 1 and metrics["entropy"] > 0
    expected = metrics["policy_loss"] + 0.2 * metrics["kl"] - 0.1 * metrics["entropy"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    kl = _reference()[1]["learner/kl"]
    assert abs(metrics["kl"] - kl) > 1e-4 * kl, "k2 is not k3"


def test_optimizer_warms_up_linearly():
    optimizer = make_optimizer(dataclasses.replace(OPTIMIZER, warmup_steps=4))
    params = {"x": jnp.ones(3)}
    state = optimizer.init(params)
    sizes = []
    for _ in range(6):
        updates, state = optimizer.update({"x": jnp.ones(3)}, state, {"x": jnp.zeros(3)})
        sizes.append(float(optax.tree.norm(updates)))
    np.testing.assert_allclose(np.array(sizes) / sizes[-1], [0.25, 0.5, 0.75, 1, 1, 1], atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_no_device_gathers_the_vocabulary(tied):
    """Rows of the embedding and columns of the head stay where the tensor axis has them, both passes."""
    for text in _compiled_of_rows(dataclasses.replace(CONFIG, tie_embeddings=tied)):
        gathers = re.findall(r"= \(?(\S+?)\[([\d,]*)\]\S* all-gather", text)
        assert gathers, "fsdp gathers the other weights"
        assert not [shape for _, shape in gathers if str(CONFIG.vocab_size) in shape.split(",")]


@pytest.mark.parametrize("unroll", [False, True])
def test_weights_are_gathered_within_the_turn_of_a_microbatch(unroll):
    """Gathered before the loop over microbatches, whole weights would be held through all of it."""
    for text in _compiled_of_rows(CONFIG, unroll=unroll):
        (before_loop,) = re.findall(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
        assert "while(" in before_loop and "all-gather" in text.replace(before_loop, "")
        assert "all-gather" not in before_loop


def _compiled_of_rows(config, **options):
    """The texts of a microbatch's gradient and of its log-probabilities, on a mesh of 2 × 2 × 2."""
    programs, shardings, _ = _programs(meshes.make_mesh(2, 2, 2), config=config, **options)
    params = jax.device_put(_params(0, config), shardings.params)
    rows, *_ = _packed(OBJECTIVE)
    given = programs.shard([rows])
    logprobs = programs.logprobs.lower(params, given)
    logprobs_MRT = given.rows.sampler_logprobs_RT
    given = given._replace(old_logprobs_MRT=logprobs_MRT, ref_logprobs_MRT=logprobs_MRT)
    gradient = programs.accumulate.lower(programs.zeros(params, given), params, given)
    return [program.compile().as_text() for program in (gradient, logprobs)]
