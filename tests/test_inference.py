"""The decoder of the rollout: prefill, one-token steps and the ring cache, against the full forward."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo.mixture import Mixture, one_hot
from ngrpo_jax.model import cache as kv
from ngrpo_jax.model import cached_attention, decoder, hf, inference
from ngrpo_jax.model.inference import InferenceModel
from ngrpo_jax.rollout import decode
from ngrpo_jax.rollout.sharding import ONE_DEVICE

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("qwen2_tied", "qwen2_untied", "qwen3", "llama", "llama_llama3", "llama_tied")
CLOSE = 5e-5  # of logits up to 20, where float32 rounding alone makes about 1e-5

PLATFORM = jax.devices()[0].platform


def prefill(model, params, ids, lengths):
    return decode.prefill(params, ids, jnp.asarray(lengths), model=model)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_step(model, params, inputs, cache):
    return model.decode_step(params, inputs, cache, model.rope_table(cache.columns))


@functools.cache
def golden(name, platform=PLATFORM):
    """(model, parameters, ids [2, T], logits [2, T, V]) of one golden directory."""
    config, params = hf.load(GOLDEN / name)
    expected, params = np.load(GOLDEN / name / "expected.npz"), inference.to_inference_layout(params, config)
    return InferenceModel(config, platform), params, expected["ids"], expected["logits"]


def largest(difference):
    return float(np.max(np.abs(difference)))


def resized(cache, size):
    """A cache with another number of columns."""
    keys = tuple(kv.resized(x, cache.cursor, size, kv.KEY_COLUMNS) for x in cache.keys)
    values = tuple(kv.resized(x, cache.cursor, size, kv.VALUE_COLUMNS) for x in cache.values)
    return cache._replace(keys=keys, values=values, cursor=jnp.int32(kv.resized_cursor(cache.columns, size)))


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_equal_the_full_forward_for_ragged_rows(name):
    """Through a ring that wraps round, grows and shrinks on the way."""
    model, params, ids, logits = golden(name)
    assert inference.is_inference_layout(params)
    ids, logits = np.tile(ids[:, :24], (2, 1)), np.tile(logits[:, :24], (2, 1, 1))
    rows, lengths = np.arange(4), np.array([3, 9, 1, 6])
    prompts = np.where(np.arange(10)[None] < lengths[:, None], ids[:, :10], 0)
    hidden, cache = prefill(model, params, prompts, lengths)
    assert largest(model.logits(params, hidden) - logits[rows, lengths - 1]) <= CLOSE
    intact = np.ones(4, bool)  # a row that has outgrown the ring has lost its beginning for good
    for step in range(10):
        if step in (1, 6):
            cache = resized(cache, {1: 13, 6: 20}[step])
        hidden, cache = decode_step(model, params, one_hot(ids[rows, lengths], 2), cache)
        intact &= lengths < cache.columns
        assert largest((model.logits(params, hidden) - logits[rows, lengths])[intact]) <= CLOSE
        lengths = lengths + 1
    cache = resized(cache, 19)
    hidden, cache = decode_step(model, params, one_hot(ids[rows, lengths], 2), cache)
    assert np.array_equal(intact, [True, False, True, True])
    assert largest((model.logits(params, hidden) - logits[rows, lengths])[intact]) <= CLOSE


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
def test_every_platforms_arithmetic_gives_the_same_model(name, platform):
    """Tokens as columns or as rows, attention by sums or by products: on this machine, whichever it is."""
    model, params, ids, logits = golden(name, platform)
    hidden, cache = prefill(model, params, ids[:, :9], jnp.array([9, 4]))
    assert largest(model.logits(params, hidden) - logits[[0, 1], [8, 3]]) <= CLOSE
    cache, lengths = resized(cache, 13), np.array([9, 4])
    for _ in range(3):
        inputs = one_hot(ids[[0, 1], lengths], 1)
        hidden, cache = decode_step(model, params, inputs, cache)
        assert largest(model.logits(params, hidden) - logits[[0, 1], lengths]) <= CLOSE
        lengths = lengths + 1


def test_prefill_in_blocks_of_queries_equals_prefill_at_once(monkeypatch):
    model, params, ids, logits = golden("qwen2_untied")
    monkeypatch.setattr(cached_attention, "QUERY_BLOCK", 8)
    with jax.disable_jit():  # no program compiled before has blocks of this size
        hidden, _ = prefill(model, params, ids[:, :21], jnp.array([21, 13]))
    assert largest(model.logits(params, hidden) - logits[[0, 1], [20, 12]]) <= CLOSE


def test_decoding_mixtures_equals_the_full_forward_over_them():
    model, params, _, _ = golden("qwen2_untied")
    _, trained = hf.load(GOLDEN / "qwen2_untied")
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), size=(2, 8)).astype(np.float32)
    mixture = Mixture(rng.integers(0, model.config.vocab_size, (2, 8, 3)).astype(np.int32), weights)
    expected = decoder.hidden_states(trained, model.config, mixture)
    cache = kv.init(model.config, 2, 8)
    for t in range(8):
        inputs = Mixture(mixture.ids[:, t], mixture.weights[:, t])
        hidden, cache = decode_step(model, params, inputs, cache)
        assert largest(hidden - expected[:, t]) <= CLOSE


def test_a_full_row_spoils_no_other():
    model, params, ids, logits = golden("qwen2_tied")
    _, cache = prefill(model, params, ids[:, :4], jnp.array([4, 2]))
    for t in (2, 3):
        hidden, cache = decode_step(model, params, one_hot(ids[:, t], 1), cache)
        got = model.logits(params, hidden)
        assert np.all(np.isfinite(got))
        assert largest(got[1] - logits[1, t]) <= CLOSE
    assert np.array_equal(cache.lengths_B, [4, 4])


def test_bfloat16_cache_and_hidden_states():
    model, params, ids, _ = golden("qwen2_tied")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    hidden, cache = prefill(model, params, ids[:, :4], jnp.array([4, 4]))
    assert cache.keys[0].dtype == cache.values[0].dtype == jnp.bfloat16
    hidden, _ = decode_step(model, params, one_hot(ids[:, 4], 1), cache)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(params, hidden).dtype == jnp.float32


@pytest.mark.parametrize(
    ("terms", "near"), [(1, 1e-5), (7, 1e-5), (16, 1e-5), (24, 1e-5), (96, 1e-5), (320, 5e-5)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_over_the_cache_equal_the_product_that_other_devices_take(terms, near, dtype):
    """Against float64; the runs of the sum are of 16 terms or of what divides their number."""
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, terms), dtype)
    y = jax.random.normal(jax.random.key(1), (3, 2, terms, 40), dtype)
    expected = np.einsum("bkgc,bkcn->bkgn", np.asarray(x, np.float64), np.asarray(y, np.float64))
    for platform in ("cpu", "gpu"):
        found = cached_attention.product(x, y, platform=platform)
        assert found.dtype == jnp.float32
        assert largest(found - expected) <= near


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_attention_over_the_cache_is_sums_on_a_cpu_alone(platform):
    product = functools.partial(cached_attention.product, platform=platform)
    program = jax.jit(product).lower(jnp.ones((3, 2, 5, 16)), jnp.ones((3, 2, 16, 40))).as_text()
    assert ("stablehlo.dot_general" in program) == (platform != "cpu")
    assert ("stablehlo.reduce" in program) == (platform == "cpu")


def test_decode_copies_no_cache():
    """The compiled loop has no copy and no transpose of an array as large as one layer's keys."""
    model, params, _, _ = golden("qwen2_untied")
    B, S = 8, 64

    def chunk(params, cache, ids_B):
        rope_table = model.rope_table(S)

        def body(carry, _):
            cache, ids_B = carry
            hidden, cache = model.decode_step(params, one_hot(ids_B, 1), cache, rope_table)
            return (cache, jnp.argmax(model.logits(params, hidden), axis=-1)), None

        return jax.lax.scan(body, (cache, ids_B), None, length=4)[0]

    cache = kv.init(model.config, B, S)
    compiled = jax.jit(chunk, donate_argnums=1).lower(params, cache, jnp.zeros(B, jnp.int32)).compile()
    size = B * S * model.config.num_kv_heads * model.config.head_dim
    instructions = re.findall(r"= \w+\[([\d,]+)\]\S* (copy|transpose)\(", compiled.as_text())
    large = [dims for dims, _ in instructions if np.prod([int(d) for d in dims.split(",")]) >= size]
    assert not large
    compiled(params, cache, jnp.zeros(B, jnp.int32))
    assert all(leaf.is_deleted() for leaf in cache.keys + cache.values)


def test_a_step_computes_no_angle():
    """Cosines and sines stand outside of the loop over steps; inside, every layer would compute them."""
    model, params, _, _ = golden("qwen3")
    cache = kv.init(model.config, 2, 8)
    step = jax.jit(InferenceModel.decode_step, static_argnums=0)
    inputs = one_hot(jnp.zeros(2, jnp.int32), 1)
    lowered = step.lower(model, params, inputs, cache, model.rope_table(cache.columns)).as_text()
    assert "cosine" not in lowered and "sine" not in lowered
    assert "cosine" in jax.jit(model.rope_table, static_argnums=0).lower(8).as_text()


def test_prefill_computes_each_angle_once():
    """However many layers and heads turn by it: XLA does not compute it anew where it is used."""
    model, params, ids, _ = golden("qwen2_untied")
    static = dict(model=model, sharding=ONE_DEVICE)
    begun = decode.prefill_begin.lower(params, ids[:, :8], jnp.array([8, 3]), **static)
    layer = decode.prefill_layer.lower(params["layers"][0], begun.out_info, **static)
    for lowered, times in ((begun, 1), (layer, 0)):
        program = lowered.compile().as_text()
        assert program.count(" cosine(") == program.count(" sine(") == times


def test_an_empty_cache_holds_no_buffer_twice():
    config = dataclasses.replace(golden("qwen3")[0].config, dtype="bfloat16")
    cache = kv.init(config, 2, 4)
    assert cache.keys[0].shape == (2, config.num_kv_heads, config.head_dim, 4)
    assert cache.keys[0].dtype == jnp.bfloat16
    assert len({leaf.unsafe_buffer_pointer() for leaf in cache.keys + cache.values}) == 2 * config.num_layers
