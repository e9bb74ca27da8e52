"""Rollouts: what is recorded replays exactly, and nothing but a sequence's own key decides what it writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo.logprobs import token_logprobs
from ngrpo_jax.algo.mixture import Mixing, Mixture, Noise
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.learner import packing
from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig, RopeScaling
from ngrpo_jax.rollout import engine
from ngrpo_jax.rollout.programs import compile_ahead
from ngrpo_jax.rollout.request import RolloutRequest, SamplingParams
from ngrpo_jax.rollout.sharding import SlotSharding
from ngrpo_jax.runtime import mesh as meshes

BASE = ModelConfig(
    architecture="qwen2",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
)
LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
CONFIGS = {
    "qwen2_tied": BASE,
    "qwen2_untied": dataclasses.replace(BASE, tie_embeddings=False),
    "qwen3": dataclasses.replace(BASE, architecture="qwen3", head_dim=16),
    "llama": dataclasses.replace(BASE, architecture="llama", tie_embeddings=False),
    "llama3_scaled": dataclasses.replace(BASE, architecture="llama", rope_scaling=LLAMA3),
}
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [20] * 11]
STOP = (1, 2)
UNTIL = (9, (14, 15))
LONGEST = max(map(len, PROMPTS)) + 24  # of any sequence here: what is replayed is padded to it

# Compiled once for each model; left to run by itself, every operation would be compiled for every length.
forward = jax.jit(decoder.forward, static_argnums=1)
hidden_states = jax.jit(decoder.hidden_states, static_argnums=1)
scores = jax.jit(token_logprobs)


def _params(config, seed=0):
    """Random parameters with logits lively enough that tokens vary and every bias and norm matters."""
    params = decoder.init(jax.random.key(seed), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.15 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def _generate(params, config, prompts=PROMPTS, **changes):
    options = dict(samples=3, max_new_tokens=24, temperature=0.9, stop_ids=STOP, seed=5) | changes
    return engine.generate(params, config, prompts, **options)


def _same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        if name == "mixtures":
            jax.tree.map(np.testing.assert_array_equal, x._replace(weights=None), y._replace(weights=None))
            np.testing.assert_allclose(x.weights, y.weights, atol=1e-5)
        elif name == "logprobs_BT":
            np.testing.assert_allclose(x, y, atol=1e-4)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_logprobs_equal_replayed_ones(name):
    config = CONFIGS[name]
    params = _params(config)
    mixing = Mixing(rate=0.5, k=3, until_ids=UNTIL)
    written = _generate(params, config, mixing=mixing, slots=4, chunk=8)
    assert written.mixed_BT.sum() > 20, "nothing was mixed: the comparison would be empty"
    assert _packed_gap(params, config, written) <= 1e-4


def _packed_gap(params, config, written):
    """The largest |Δ log-probability| of all response tokens, replayed in packed rows as the learner does."""
    count, longest = written.tokens_BT.shape
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    batch = packing.Batch(prompts, written, np.zeros(count))
    rows = packing.pack(batch, np.zeros((count, longest)), packing.RowLayout(64, 1))
    hidden = hidden_states(
        params, config, rows.inputs, positions_BT=rows.positions_RT, segment_ids_BT=rows.segment_ids_RT
    )
    replayed, _ = scores(hidden, decoder.head(params, config), rows.targets_RT, 0.9)
    gap = np.abs(np.asarray(replayed) - rows.sampler_logprobs_RT)[rows.response_mask_RT]
    assert len(gap) == written.lengths_B.sum()
    return gap.max()


STRATEGIES = {
    "l2": Mixing(k=3, metric="l2"),
    "l1": Mixing(k=3, metric="l1"),
    "dot": Mixing(k=3, metric="dot"),
    "release": Mixing(k=2, table="head", weights="probs", token="sampled"),
    "soft": Mixing("soft", k=5),
    "gumbel": Mixing("gumbel", k=5),
    "noise": Mixing("noise"),
}


def _replayed_logprobs(params, config, prompt, written, index):
    """Log-probabilities of one response by the model, from the prompt and the recorded mixtures alone."""
    count, before = int(written.lengths_B[index]), len(prompt)
    mixtures = written.mixtures
    padding = ((0, 0), (before, LONGEST - before - count + 1), (0, 0))
    ids, weights = (np.pad(leaf[index : index + 1, : count - 1], padding) for leaf in mixtures[:2])
    ids[0, :before] = np.array(prompt)[:, None]
    weights[0, :before, 0] = 1.0
    noise = None
    if mixtures.noise is not None:
        parts = (leaf[index : index + 1, : count - 1] for leaf in mixtures.noise)
        noise = Noise(*(np.pad(leaf, padding[: leaf.ndim]) for leaf in parts))
    logits = forward(params, config, jax.tree.map(jnp.asarray, Mixture(ids, weights, noise)))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0] / 0.9))[before - 1 :]
    return logprobs[np.arange(count), written.response(index)]


def _next_logits(params, ids):
    """float32 [V] after `ids`, by the plain model."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(params, BASE, padded))[0, len(ids) - 1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_replays_exactly(name):
    """Rollout log-probabilities equal replayed ones to 1e-4 at ρ = 0.5, and mixing ends with the thinking."""
    config = CONFIGS["qwen2_untied"]
    params = _params(config)
    mixing = dataclasses.replace(STRATEGIES[name], rate=0.5, until_ids=UNTIL)
    written = _generate(params, config, mixing=mixing, slots=4, chunk=8)
    assert written.mixed_BT.sum() > 20, "nothing was mixed: the comparison would be empty"
    assert written.mixtures.ids.shape == (9, 24, mixing.candidates)
    for index in range(9):
        replayed = _replayed_logprobs(params, config, PROMPTS[index // 3], written, index)
        np.testing.assert_allclose(
            replayed, written.logprobs_BT[index, : written.lengths_B[index]], atol=1e-4
        )
    assert _packed_gap(params, config, written) <= 1e-4
    ordinary = ~written.mixed_BT
    if mixing.noisy:
        np.testing.assert_array_equal(written.mixtures.noise.scale[ordinary], 0)
        assert (written.mixtures.noise.scale[written.mixed_BT] == np.float32(0.33)).all()
    np.testing.assert_array_equal(written.mixtures.weights[ordinary, 0], 1)
    for tokens, mixed in zip(written.tokens_BT, written.mixed_BT, strict=True):
        ends = [t for t in range(24) if tokens[t] == 9 or tuple(tokens[t - 1 : t + 1]) == (14, 15)]
        assert not ends or not mixed[ends[0] + 1 :].any()


def test_the_head_table_is_of_the_heads_rows():
    config = CONFIGS["qwen2_untied"]
    params = _params(config)
    written = _generate(params, config, mixing=Mixing(rate=1.0, k=3, table="head"), samples=1)
    of_head = np.asarray(neighbor_table(params["head"]["rows"], 3))
    of_embedding = np.asarray(neighbor_table(params["embed"]["embedding"], 3))
    assert (of_head != of_embedding).any()
    mixed = written.mixed_BT
    np.testing.assert_array_equal(written.mixtures.ids[mixed], of_head[written.tokens_BT[mixed]])


def test_tokens_kept_out_are_written_by_ordinary_steps():
    params = _params(BASE)
    everything = Mixing(rate=1.0, k=3)
    anchors = set(_generate(params, BASE, mixing=everything, stop_ids=()).tokens_BT[:, 0].tolist())
    some = tuple(sorted(anchors))[:1]
    written = _generate(params, BASE, mixing=dataclasses.replace(everything, keep_out_ids=some), stop_ids=())
    assert not written.mixed_BT.all() and written.mixed_BT.any()
    assert not np.isin(written.tokens_BT[written.mixed_BT], some).any()


@pytest.mark.parametrize("strategy", ["neighbor", "soft", "gumbel", "noise"])
def test_rate_zero_is_a_plain_rollout_token_for_token(strategy):
    params = _params(BASE)
    plain = _generate(params, BASE)
    mixed = _generate(params, BASE, mixing=Mixing(strategy, rate=0.0, k=3, until_ids=UNTIL))
    np.testing.assert_array_equal(plain.tokens_BT, mixed.tokens_BT)
    np.testing.assert_array_equal(plain.lengths_B, mixed.lengths_B)
    assert not mixed.mixed_BT.any()
    assert len({tuple(row) for row in plain.tokens_BT}) > 5, "all samples alike: the test would prove nothing"


@pytest.mark.parametrize("strategy", ["neighbor", "noise"])
def test_slots_chunk_and_order_do_not_change_a_trajectory(strategy):
    params = _params(BASE)
    mixing = Mixing(strategy, rate=0.3, k=3, until_ids=UNTIL)
    whole = _generate(params, BASE, mixing=mixing)
    for slots, chunk in ((4, 8), (16, 32), (2, 5)):
        _same(whole, _generate(params, BASE, mixing=mixing, slots=slots, chunk=chunk))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(9))
    order = [2, 0, 1]
    shuffled = _generate(
        params,
        BASE,
        [PROMPTS[i] for i in order],
        mixing=mixing,
        keys_B=keys.reshape(3, 3)[jnp.array(order)].reshape(9),
        slots=4,
    )
    for place, index in enumerate(order):
        _same(whole.part(3 * index, 3 * index + 3), shuffled.part(3 * place, 3 * place + 3))


@pytest.mark.parametrize("strategy", ["neighbor", "noise"])
def test_slots_are_halved_as_sequences_end(strategy):
    params, bounds = _params(BASE), np.array([3, 24, 7, 2, 9, 2, 20, 3, 11] * 2)
    options = dict(mixing=Mixing(strategy, rate=0.3, k=3, until_ids=UNTIL), samples=6, lengths_B=bounds)
    stats = engine.RolloutStats()
    halved = _generate(params, BASE, **options, slots=16, chunk=1, stats=stats)
    _same(halved, _generate(params, BASE, **options, slots=16, chunk=24))
    assert stats.steps * 4 < stats.rows < 0.7 * stats.steps * 16
    assert stats.occupancy == stats.tokens / stats.rows > 0.6


def test_slots_of_eight_devices_are_halved_alike():
    config = dataclasses.replace(BASE, vocab_size=98)
    params, bounds = _params(config), np.array([3, 24, 7, 2, 9, 2, 20, 3, 11] * 4)
    options = dict(mixing=Mixing(rate=0.3, k=3), samples=12, lengths_B=bounds, stop_ids=())
    one = _generate(params, config, **options)
    mesh = meshes.make_mesh(4, 1, 2)
    laid_out = inference.to_inference_layout(params, config)
    placed = jax.device_put(laid_out, meshes.param_shardings(mesh, laid_out, layout="tensor"))
    table_VC = jax.device_put(neighbor_table(params["embed"]["embedding"], 3), meshes.replicated(mesh))
    stats, rows = engine.RolloutStats(), meshes.slots_sharding(mesh, "tensor")
    options |= dict(table_VC=table_VC, sharding=rows, slots=32, chunk=1, stats=stats)
    _same(one, _generate(placed, config, **options))
    assert stats.rows < 0.8 * stats.steps * 32


def test_eight_devices_write_what_one_does():
    params = _params(BASE)
    mixing = Mixing(rate=0.3, k=3, until_ids=UNTIL)
    table_VC = neighbor_table(params["embed"]["embedding"], 3)
    one = _generate(params, BASE, mixing=mixing, table_VC=table_VC)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed, table_VC = jax.device_put((params, table_VC), whole)
    _same(one, _generate(placed, BASE, mixing=mixing, table_VC=table_VC, sharding=rows, slots=8, chunk=8))


@pytest.mark.parametrize("layout", ["tensor", "replicated"])
def test_tensor_parallel_rollouts_mix_and_write_what_one_device_does(layout):
    """Heads and vocabulary over two devices, or whole copies; slots over what is left; refills on the way."""
    config = dataclasses.replace(BASE, vocab_size=98, tie_embeddings=False)
    params = _params(config)
    mixing = Mixing(rate=0.3, k=3, until_ids=UNTIL)
    table_VC = neighbor_table(params["embed"]["embedding"], 3)
    one = _generate(params, config, mixing=mixing, table_VC=table_VC)
    mesh = meshes.make_mesh(2, 2, 2)
    laid_out = inference.to_inference_layout(params, config)
    placed = jax.device_put(laid_out, meshes.param_shardings(mesh, laid_out, layout=layout))
    table_VC = jax.device_put(table_VC, meshes.replicated(mesh))
    sharding = meshes.slots_sharding(mesh, layout)
    split = SlotSharding.of(sharding, placed)
    assert (split.heads, split.shards) == {"tensor": ("tensor", 4), "replicated": (None, 8)}[layout]
    stats = engine.RolloutStats()
    options = dict(mixing=mixing, table_VC=table_VC, sharding=sharding, slots=4, chunk=8, stats=stats)
    _same(one, _generate(placed, config, **options))
    assert one.mixed_BT.any() and (stats.queued_steps > 0 or layout == "replicated")


def test_mixing_ends_with_the_thinking_and_writes_the_anchor():
    """(11): mixed only before `until` is completed; the written token is the anchor, the first candidate."""
    params = _params(BASE)
    free = _generate(params, BASE, mixing=Mixing(rate=1.0, k=3), stop_ids=())
    assert free.mixed_BT.all(), "no `until`: mixing never ends"
    # One ending of a single token, one of two in a row, taken from what is about to be written.
    until = (int(free.tokens_BT[0, 4]), tuple(int(t) for t in free.tokens_BT[3, 5:7]))
    written = _generate(params, BASE, mixing=Mixing(rate=1.0, k=3, until_ids=until), stop_ids=())
    endings = []
    for tokens, mixed, ids in zip(written.tokens_BT, written.mixed_BT, written.mixtures.ids, strict=True):
        ends = [t for t in range(24) if tokens[t] == until[0] or tuple(tokens[t - 1 : t + 1]) == until[1]]
        first = ends[0] if ends else 24
        endings.append(first)
        assert mixed[: first + 1].all(), "the anchor that completes the ending is itself fed mixed"
        assert not mixed[first + 1 :].any(), "mixing came back after its end"
        np.testing.assert_array_equal(ids[:, 0], tokens)
    assert endings[0] <= 4 and endings[3] <= 6


def test_neighbor_mixture_weights_in_a_rollout():
    """(6)-(9) seen from outside: weights are the softmax of the tempered logits over the table's row."""
    params = _params(BASE)
    table_VC = np.asarray(neighbor_table(params["embed"]["embedding"], 3))
    written = _generate(params, BASE, mixing=Mixing(rate=1.0, k=3), samples=1, max_new_tokens=3)
    for row, prompt in enumerate(PROMPTS):
        logits_V = _next_logits(params, prompt) / 0.9
        ids = table_VC[logits_V.argmax()]
        weights = np.exp(logits_V[ids] - logits_V[ids].max())
        np.testing.assert_array_equal(written.mixtures.ids[row, 0], ids)
        np.testing.assert_allclose(written.mixtures.weights[row, 0], weights / weights.sum(), atol=1e-5)


def test_greedy_is_the_argmax_chain():
    params = _params(BASE)
    written = _generate(params, BASE, temperature=0.0, samples=1, max_new_tokens=6, stop_ids=())
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(_next_logits(params, ids).argmax()))
        assert written.tokens_BT[row].tolist() == ids[len(prompt) :]


def test_stop_ids_end_a_response_and_what_follows_is_blank():
    params = _params(BASE)
    written = _generate(params, BASE, samples=8, stop_ids=tuple(range(0, 97, 9)))
    assert written.stopped_B.any() and len(set(written.lengths_B.tolist())) > 2
    for row in range(24):
        length = written.lengths_B[row]
        tokens = written.tokens_BT[row]
        assert (tokens[length - 1] % 9 == 0) == written.stopped_B[row]
        assert not (tokens[: length - 1] % 9 == 0).any()
        assert not tokens[length:].any() and not written.logprobs_BT[row, length:].any()
        assert not written.mixed_BT[row, length:].any()
    no_stop = _generate(params, BASE, stop_ids=())
    assert (no_stop.lengths_B == 24).all() and not no_stop.stopped_B.any()


def test_top_k_one_draws_the_argmax():
    params = _params(BASE)
    greedy = _generate(params, BASE, temperature=0.0, samples=1)
    np.testing.assert_array_equal(_generate(params, BASE, top_k=1, samples=1).tokens_BT, greedy.tokens_BT)


def compilations():
    """A list that grows by a name for each program that XLA compiles from now on."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **about: (
            compiled.append(about) if name.endswith("backend_compile_duration") else None
        )
    )
    return compiled


def test_nothing_compiles_after_compile_ahead():
    """All cache sizes, prompt lengths and refills are there, whatever the lengths turn out to be."""
    params = inference.to_inference_layout(_params(BASE), BASE)
    mixing = Mixing(rate=0.3, k=3, until_ids=UNTIL)
    table_VC = neighbor_table(params["embed"]["embedding"], 3)
    options = dict(samples=2, max_new_tokens=150, temperature=0.9, mixing=mixing, table_VC=table_VC)
    options |= dict(stop_ids=(), slots=8, chunk=8, max_prompt_tokens=120)
    request = RolloutRequest(
        BASE,
        SamplingParams(0.9, mixing=mixing, stop_ids=()),
        samples=2,
        max_new_tokens=150,
        slots=8,
        chunk=8,
        max_prompt_tokens=120,
    )
    assert compile_ahead(params, request, table_VC) > 0
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 8))
    compiled = compilations()
    rng = np.random.default_rng(0)
    sizes = set()
    for lengths in ((2, 3, 9, 1), (60, 8, 70, 33), (5, 5, 5, 120)):
        prompts = [rng.integers(3, 97, size=n).tolist() for n in lengths]
        bounds = np.clip(np.exp(rng.normal(3.5, 1.2, size=8)), 1, 150).astype(int)  # a long tail: slots halve
        engine.generate(params, BASE, prompts, keys_B=keys, lengths_B=bounds, **options)
        sizes.add(max(lengths))
    assert len(sizes) == 3
    # Half of the sequences end early, so that the cache of the other half grows in halved slots.
    prompts = [[5, 6], [7], [8, 9, 10], [11]]
    bounds, stats = np.array([20, 150] * 4), engine.RolloutStats()
    engine.generate(params, BASE, prompts, keys_B=keys, lengths_B=bounds, stats=stats, **options)
    assert stats.rows < stats.steps * 8
    assert not compiled
    jax.jit(lambda x: x + 3)(jnp.ones(3))
    assert compiled, "the listener heard nothing: the test would prove nothing"


def test_each_response_can_have_a_bound_of_its_own():
    params = _params(BASE)
    bounds = np.array([1, 5, 24, 7, 2, 9, 16, 3, 11])
    free = _generate(params, BASE, stop_ids=())
    stats = engine.RolloutStats()
    written = _generate(params, BASE, stop_ids=(), lengths_B=bounds, slots=4, chunk=4, stats=stats)
    np.testing.assert_array_equal(written.lengths_B, bounds)
    for row, bound in enumerate(bounds):
        np.testing.assert_array_equal(written.tokens_BT[row, :bound], free.tokens_BT[row, :bound])
    assert stats.tokens == bounds.sum() and stats.done == stats.sequences == 9
    assert 0 < stats.queued_steps < stats.steps
    assert stats.occupancy == stats.tokens / (stats.steps * 4) and 0 < stats.queued_occupancy <= 1  # no half


def test_reading_flags_a_chunk_late_changes_nothing():
    params = _params(BASE)
    stop_ids = tuple(range(0, 97, 9))
    now = _generate(params, BASE, stop_ids=stop_ids, samples=6, slots=4, chunk=4, lookahead=0)
    late = _generate(params, BASE, stop_ids=stop_ids, samples=6, slots=4, chunk=4, lookahead=1)
    _same(now, late)


def test_logits_that_are_no_numbers_end_their_sequence_and_no_other():
    """A poisoned row of the embedding: who writes that token has NaN logits from the next step on."""
    params = _params(BASE)
    clean = _generate(params, BASE, stop_ids=())
    token = int(clean.tokens_BT[0, 5])
    poisoned = jax.tree.map(lambda x: x, params)
    untied = dataclasses.replace(BASE, tie_embeddings=False)
    head = {"rows": params["embed"]["embedding"]}
    poisoned["embed"] = {"embedding": params["embed"]["embedding"].at[token].set(jnp.nan)}
    poisoned["head"] = head
    prompts = [[t for t in prompt if t != token] for prompt in PROMPTS]
    clean = _generate(params | {"head": head}, untied, prompts, stop_ids=())
    written = _generate(poisoned, untied, prompts, stop_ids=(), slots=4, chunk=4)
    assert written.nonfinite_B.any() and not written.nonfinite_B.all()
    for row in range(9):
        places = np.flatnonzero(clean.tokens_BT[row] == token)
        length = places[0] + 1 if len(places) and places[0] < 23 else 24
        assert written.nonfinite_B[row] == (length < 24) and written.lengths_B[row] == length
        np.testing.assert_array_equal(written.tokens_BT[row, :length], clean.tokens_BT[row, :length])
        assert np.isfinite(written.logprobs_BT[row]).all() and not written.stopped_B[row]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(samples=0), "samples is 0"),
        (dict(temperature=-1.0), "temperature -1.0"),
        (dict(top_p=0.0), "top_p 0.0"),
        (dict(stop_ids=(97,)), "stop id 97"),
        (dict(max_prompt_tokens=10), "prompt 2 has 11 tokens, but the cache has room for 10"),
        (dict(prompts=[[97]]), "prompt 0 holds a token outside the vocabulary"),
        (dict(lengths_B=np.full(9, 25)), "lengths_B must hold a number from 1 to max_new_tokens = 24"),
        (dict(temperature=0.0, mixing=Mixing()), "temperature is 0 with mixing on"),
        (dict(mixing=Mixing(), table_VC=np.zeros((96, 3), np.int32)), r"shape \(96, 3\)"),
        (dict(keys_B=np.zeros((4, 2), np.uint32)), "one key for each of the 9"),
    ],
)
def test_bad_arguments_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        _generate(_params(BASE), BASE, **changes)
