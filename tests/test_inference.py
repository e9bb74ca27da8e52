"""The decoder laid out for writing: prefill, one-token steps and the ring cache, against the full forward."""

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
from ngrpo_jax.model import decoder, hf, inference

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("qwen2_tied", "qwen2_untied", "qwen3", "llama", "llama_llama3", "llama_tied")
CLOSE = 5e-5  # of logits up to 20, where float32 rounding alone makes about 1e-5

prefill = jax.jit(inference.prefill, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=3)
def decode_step(params, config, inputs, cache):
    return inference.decode_step(params, config, inputs, cache, inference.rope_table(config, cache.columns))


@functools.cache
def golden(name):
    """(config, laid-out parameters, ids [2, T], logits [2, T, V]) of one golden directory."""
    config, params = hf.load(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    return config, inference.to_inference_layout(params, config), expected["ids"], expected["logits"]


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
    config, params, ids, logits = golden(name)
    assert inference.is_inference_layout(params)
    ids, logits = np.tile(ids[:, :24], (2, 1)), np.tile(logits[:, :24], (2, 1, 1))
    rows, lengths = np.arange(4), np.array([3, 9, 1, 6])
    prompts = np.where(np.arange(10)[None] < lengths[:, None], ids[:, :10], 0)
    hidden, cache = prefill(params, config, prompts, lengths)
    assert largest(inference.logits(params, hidden) - logits[rows, lengths - 1]) <= CLOSE
    intact = np.ones(4, bool)  # a row that has outgrown the ring has lost its beginning for good
    for step in range(10):
        if step in (1, 6):
            cache = resized(cache, {1: 13, 6: 20}[step])
        hidden, cache = decode_step(params, config, one_hot(ids[rows, lengths], 2), cache)
        intact &= lengths < cache.columns
        assert largest((inference.logits(params, hidden) - logits[rows, lengths])[intact]) <= CLOSE
        lengths = lengths + 1
    cache = resized(cache, 19)
    hidden, cache = decode_step(params, config, one_hot(ids[rows, lengths], 2), cache)
    assert np.array_equal(intact, [True, False, True, True])
    assert largest((inference.logits(params, hidden) - logits[rows, lengths])[intact]) <= CLOSE


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
def test_tokens_may_lie_along_either_axis(name, axis, monkeypatch):
    """As rows and as columns, whatever this machine's choice is."""
    config, params, ids, logits = golden(name)
    monkeypatch.setattr(inference, "token_axis", lambda: axis)
    # Functions of their own: what was compiled for the machine's choice must not be found again.
    begin = jax.jit(lambda params, *given: inference.prefill(params, config, *given))
    step = jax.jit(lambda params, *given: inference.decode_step(params, config, *given))
    hidden, cache = begin(params, ids[:, :9], jnp.array([9, 4]))
    assert largest(inference.logits(params, hidden) - logits[[0, 1], [8, 3]]) <= CLOSE
    cache, lengths = resized(cache, 13), np.array([9, 4])
    for _ in range(3):
        inputs = one_hot(ids[[0, 1], lengths], 1)
        hidden, cache = step(params, inputs, cache, inference.rope_table(config, 13))
        assert largest(inference.logits(params, hidden) - logits[[0, 1], lengths]) <= CLOSE
        lengths = lengths + 1


def test_prefill_in_blocks_of_queries_equals_prefill_at_once(monkeypatch):
    config, params, ids, logits = golden("qwen2_untied")
    monkeypatch.setattr(inference, "QUERY_BLOCK", 8)
    in_blocks = jax.jit(lambda params, *given: inference.prefill(params, config, *given))
    hidden, _ = in_blocks(params, ids[:, :21], jnp.array([21, 13]))
    assert largest(inference.logits(params, hidden) - logits[[0, 1], [20, 12]]) <= CLOSE


def test_decoding_mixtures_equals_the_full_forward_over_them():
    config, params, _, _ = golden("qwen2_untied")
    _, trained = hf.load(GOLDEN / "qwen2_untied")
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), size=(2, 8)).astype(np.float32)
    mixture = Mixture(rng.integers(0, config.vocab_size, (2, 8, 3)).astype(np.int32), weights)
    expected = decoder.hidden_states(trained, config, mixture)
    cache = kv.init(config, 2, 8)
    for t in range(8):
        inputs = Mixture(mixture.ids[:, t], mixture.weights[:, t])
        hidden, cache = decode_step(params, config, inputs, cache)
        assert largest(hidden - expected[:, t]) <= CLOSE


def test_a_full_row_spoils_no_other():
    config, params, ids, logits = golden("qwen2_tied")
    _, cache = prefill(params, config, ids[:, :4], jnp.array([4, 2]))
    for t in (2, 3):
        hidden, cache = decode_step(params, config, one_hot(ids[:, t], 1), cache)
        got = inference.logits(params, hidden)
        assert np.all(np.isfinite(got))
        assert largest(got[1] - logits[1, t]) <= CLOSE
    assert np.array_equal(cache.lengths_B, [4, 4])


def test_bfloat16_cache_and_hidden_states():
    config, params, ids, _ = golden("qwen2_tied")
    config = dataclasses.replace(config, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    hidden, cache = prefill(params, config, ids[:, :4], jnp.array([4, 4]))
    assert cache.keys[0].dtype == cache.values[0].dtype == jnp.bfloat16
    hidden, _ = decode_step(params, config, one_hot(ids[:, 4], 1), cache)
    assert hidden.dtype == jnp.bfloat16
    assert inference.logits(params, hidden).dtype == jnp.float32


@pytest.mark.parametrize(
    ("terms", "near"), [(1, 1e-5), (7, 1e-5), (16, 1e-5), (24, 1e-5), (96, 1e-5), (320, 5e-5)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_over_the_cache_equal_the_product_that_other_devices_take(terms, near, dtype):
    """Against float64; the runs of the sum are of 16 terms or of what divides their number."""
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, terms), dtype)
    y = jax.random.normal(jax.random.key(1), (3, 2, terms, 40), dtype)
    expected = np.einsum("bkgc,bkcn->bkgn", np.asarray(x, np.float64), np.asarray(y, np.float64))
    for product in (inference._product_by_sums, inference._product_by_dot):
        found = product(x, y)
        assert found.dtype == jnp.float32
        assert largest(found - expected) <= near


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_a_program_holds_the_product_of_its_platform_alone(platform):
    x, y = jnp.ones((3, 2, 5, 16)), jnp.ones((3, 2, 16, 40))
    program = jax.jit(inference._product).trace(x, y).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.dot_general" in program) == (platform != "cpu")
    assert ("stablehlo.reduce" in program) == (platform == "cpu")


def test_decode_copies_no_cache():
    """The compiled loop has no copy and no transpose of an array as large as one layer's keys."""
    config, params, _, _ = golden("qwen2_untied")
    B, S = 8, 64

    def chunk(params, cache, ids_B):
        rope_table = inference.rope_table(config, S)

        def body(carry, _):
            cache, ids_B = carry
            hidden, cache = inference.decode_step(params, config, one_hot(ids_B, 1), cache, rope_table)
            return (cache, jnp.argmax(inference.logits(params, hidden), axis=-1)), None

        return jax.lax.scan(body, (cache, ids_B), None, length=4)[0]

    cache = kv.init(config, B, S)
    compiled = jax.jit(chunk, donate_argnums=1).lower(params, cache, jnp.zeros(B, jnp.int32)).compile()
    size = B * S * config.num_kv_heads * config.head_dim
    instructions = re.findall(r"= \w+\[([\d,]+)\]\S* (copy|transpose)\(", compiled.as_text())
    large = [dims for dims, _ in instructions if np.prod([int(d) for d in dims.split(",")]) >= size]
    assert not large
    compiled(params, cache, jnp.zeros(B, jnp.int32))
    assert all(leaf.is_deleted() for leaf in cache.keys + cache.values)


def test_a_step_computes_no_angle():
    """Cosines and sines stand outside of the loop over steps; inside, every layer would compute them."""
    config, params, _, _ = golden("qwen3")
    cache = kv.init(config, 2, 8)
    rope_table = inference.rope_table(config, cache.columns)
    step = jax.jit(inference.decode_step, static_argnums=1)
    lowered = step.lower(params, config, one_hot(jnp.zeros(2, jnp.int32), 1), cache, rope_table).as_text()
    assert "cosine" not in lowered and "sine" not in lowered
    assert "cosine" in jax.jit(inference.rope_table, static_argnums=(0, 1)).lower(config, 8).as_text()


def test_prefill_computes_each_angle_once():
    """However many layers and heads turn by it: XLA does not compute it anew where it is used."""
    config, params, ids, _ = golden("qwen2_untied")
    program = prefill.lower(params, config, ids[:, :8], jnp.array([8, 3])).compile().as_text()
    assert program.count(" cosine(") == program.count(" sine(") == 1


def test_an_empty_cache_holds_no_buffer_twice():
    config = dataclasses.replace(golden("qwen3")[0], dtype="bfloat16")
    cache = kv.init(config, 2, 4)
    assert cache.keys[0].shape == (2, config.num_kv_heads, config.head_dim, 4)
    assert cache.keys[0].dtype == jnp.bfloat16
    assert len({leaf.unsafe_buffer_pointer() for leaf in cache.keys + cache.values}) == 2 * config.num_layers
