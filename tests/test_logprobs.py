"""Chunked log-probabilities and entropy against the full logits, their gradients, and what they may hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ngrpo_jax.algo.logprobs import token_logprobs, token_loss
from ngrpo_jax.algo.shards import Axis, Shards
from ngrpo_jax.algo.vocabulary import Vocabulary

B, T, D, V = 2, 11, 8, 37


def _inputs(seed=0, batch=B, time=T):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, time, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    return hidden, head, rng.integers(0, V, (batch, time)).astype(np.int32)


def _full(hidden, head, targets, temperature):
    """The same from the whole [B, T, V], in JAX for its gradient."""
    logprobs = jax.nn.log_softmax(jnp.asarray(hidden) @ jnp.asarray(head).T / temperature)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


@pytest.mark.parametrize("chunk", [1, 4, 6, 7, 22, 1000])
def test_token_logprobs_and_entropy(chunk):
    hidden, head, targets = _inputs()
    logprobs, entropy = jax.jit(functools.partial(token_logprobs, chunk=chunk))(hidden, head, targets, 0.7)
    assert logprobs.shape == entropy.shape == (B, T)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    logits = hidden.astype(np.float64) @ head.T / 0.7
    logits -= logits.max(-1, keepdims=True)
    law = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        logprobs, np.log(np.take_along_axis(law, targets[..., None], -1)[..., 0]), rtol=1e-5
    )
    # The entropy is a small difference of sums near 10, whose rounding does not shrink with it.
    np.testing.assert_allclose(entropy, -(law * np.log(law)).sum(-1), rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_gradients_are_those_of_the_full_computation(chunk):
    hidden, head, targets = _inputs()
    rng = np.random.default_rng(1)
    weight, tilt = (rng.normal(size=(B, T)).astype(np.float32) for _ in range(2))

    def total(compute, hidden, head):
        logprobs, entropy = compute(hidden, head, targets, 0.7)
        return jnp.sum(weight * logprobs + tilt * entropy)

    chunked = jax.grad(functools.partial(total, functools.partial(token_logprobs, chunk=chunk)), (0, 1))
    expected = jax.grad(functools.partial(total, _full), (0, 1))(hidden, head)
    for got, want in zip(chunked(hidden, head), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_temperature_may_be_traced_and_scales_the_logits():
    hidden, head, targets = _inputs()
    traced = jax.jit(token_logprobs)(hidden, head, targets, jnp.float32(0.5))[0]
    np.testing.assert_allclose(traced, token_logprobs(2 * hidden, head, targets, 1.0)[0], rtol=1e-5)


def test_large_logits_stay_finite():
    hidden, head, targets = _inputs()
    logprobs, entropy = token_logprobs(1e4 * hidden, head, targets, 1.0)
    assert np.isfinite(logprobs).all() and np.isfinite(entropy).all()
    np.testing.assert_allclose(entropy, 0, atol=1e-3)


def test_uniform_law_has_entropy_log_v():
    _, head, targets = _inputs()
    logprobs, entropy = token_logprobs(np.zeros((B, T, D), np.float32), head, targets, 0.7)
    np.testing.assert_allclose(entropy, np.log(V), rtol=1e-6)
    np.testing.assert_allclose(logprobs, -np.log(V), rtol=1e-6)


def _compiled(time, chunk):
    hidden, head, targets = _inputs(time=time)

    def total(hidden, head):
        logprobs, entropy = token_logprobs(hidden, head, targets, 0.7, chunk=chunk)
        return jnp.sum(logprobs + entropy)

    return jax.jit(jax.grad(total, (0, 1))).lower(hidden, head).compile()


def test_neither_pass_holds_all_logits():
    full, chunk = B * 512 * V, 16
    scratch = _compiled(512, chunk).memory_analysis().temp_size_in_bytes
    assert scratch < 4 * full / 2
    assert scratch < 4 * (8 * B * 512 * D + 8 * chunk * V + 8 * D * V)


def _products(jaxpr):
    """Every matrix product of a jaxpr, those of its inner jaxprs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _products(inner)


def test_products_are_in_the_dtype_of_hidden_with_float32_sums():
    hidden, head, targets = _inputs()
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def total(hidden, head):
        return jnp.sum(token_logprobs(hidden, head, targets, 0.7)[0])

    products = list(_products(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, head).jaxpr))
    assert len(products) >= 4  # forward, again for the backward pass, and two gradients
    for product in products:
        assert [operand.aval.dtype for operand in product.invars] == [jnp.bfloat16, jnp.bfloat16]
        assert product.outvars[0].aval.dtype == jnp.float32
    to_hidden, to_head = jax.grad(total, (0, 1))(hidden, head)
    assert to_hidden.dtype == jnp.bfloat16 and to_head.dtype == jnp.float32
    rounded = np.asarray(hidden, np.float32), np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(
        token_logprobs(hidden, head, targets, 0.7)[0], _full(*rounded, targets, 0.7)[0], rtol=1e-5
    )
    exact = jax.grad(lambda h, w: jnp.sum(_full(h, w, targets, 0.7)[0]), (0, 1))(*rounded)
    for got, want in zip((to_hidden, to_head), exact, strict=True):
        assert np.abs(np.asarray(got, np.float32) - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_head_sharded_over_the_vocabulary_and_batch_sharded_over_the_data():
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(4, 6, D)).astype(np.float32)
    head = rng.normal(size=(40, D)).astype(np.float32)
    targets = rng.integers(0, 40, (4, 6)).astype(np.int32)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    compute = jax.jit(functools.partial(token_logprobs, chunk=8))
    arguments = put(hidden, "data"), put(head, "tensor"), put(targets, "data"), 0.7
    for got, want in zip(compute(*arguments), _full(hidden, head, targets, 0.7), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # Nothing as large as the head is gathered: the vocabulary stays where it is.
    text = compute.lower(*arguments).compile().as_text()
    assert "all-gather" not in text and "all-reduce" in text


@pytest.mark.parametrize("temperature", [0.0, -0.5])
def test_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(*_inputs(), temperature)


@pytest.mark.parametrize("chunk", [2, 6, 1000])
def test_only_response_tokens_are_projected(chunk):
    hidden, head, targets = _inputs()
    mask = np.random.default_rng(3).random((B, T)) < 0.4
    hidden[~mask] = np.nan  # must not be read
    logprobs, entropy = token_logprobs(hidden, head, targets, 0.7, chunk=chunk, response_mask_BT=mask)
    want_logprobs, want_entropy = _full(np.nan_to_num(hidden), head, targets, 0.7)
    np.testing.assert_allclose(logprobs, np.where(mask, want_logprobs, 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, np.where(mask, want_entropy, 0.0), rtol=1e-5, atol=1e-6)
    alone, nothing = token_logprobs(
        hidden, head, targets, 0.7, chunk=chunk, response_mask_BT=mask, entropy=False
    )
    np.testing.assert_array_equal(alone, logprobs)
    assert not nothing.any()


def _example_loss(logprobs, entropy, mask, given):
    weight = jnp.where(mask, given, 0.0)
    value = jnp.sum(weight * jnp.exp(0.3 * logprobs) - 0.1 * weight * entropy)
    return value, {"sum": jnp.sum(weight * logprobs), "count": jnp.sum(mask)}


@pytest.mark.parametrize("chunk", [2, 6, 1000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_token_loss_and_its_gradients_are_those_of_the_full_computation(chunk, share):
    hidden, head, targets = _inputs()
    rng = np.random.default_rng(4)
    mask, given = rng.random((B, T)) < share, rng.normal(size=(B, T)).astype(np.float32)

    def chunked(hidden, head):
        return token_loss(_example_loss, 0.7, chunk=chunk)(hidden, head, targets, mask, given)

    def full(hidden, head):
        return _example_loss(*_full(hidden, head, targets, 0.7), mask, given)

    (value, parts), got = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, head)
    (wanted, metrics), want = jax.value_and_grad(full, (0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chunked(hidden, head)[0], wanted, rtol=1e-5, atol=1e-6)
    for name, total in metrics.items():
        np.testing.assert_allclose(jnp.sum(parts[name]), total, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    doubled = jax.grad(lambda h: 2 * chunked(h, head)[0])(hidden)
    np.testing.assert_allclose(doubled, 2 * got[0], rtol=1e-5, atol=1e-6)


def test_token_loss_multiplies_three_times_and_holds_a_chunk_of_logits():
    hidden, head, targets = _inputs(time=512)
    mask, given = np.ones((B, 512), bool), np.ones((B, 512), np.float32)

    def total(hidden, head):
        return token_loss(_example_loss, 0.7, chunk=16)(hidden, head, targets, mask, given)[0]

    gradient = jax.grad(total, (0, 1))
    assert len(list(_products(jax.make_jaxpr(gradient)(hidden, head).jaxpr))) == 3
    scratch = jax.jit(gradient).lower(hidden, head).compile().memory_analysis().temp_size_in_bytes
    assert scratch < 4 * (10 * B * 512 * D + 8 * 16 * V + 8 * D * V)


@pytest.mark.parametrize("size", [32, 33, 34, 35])
def test_every_token_is_counted_once_where_a_vocabulary_is_split_over_two_axes(size):
    """Also where its parts are padded: the first part of 34 tokens is 17, of devices with 9 each."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    vocabulary = Vocabulary(size, Shards(fsdp=Axis("fsdp", 2), tensor=Axis("tensor", 2)))
    hidden, head, _ = _inputs(batch=2, time=size)
    head, targets = head[:size], np.tile(np.arange(size, dtype=np.int32), (2, 1))
    rows, of_head = PartitionSpec("fsdp"), PartitionSpec(None if size % 2 else "tensor", "fsdp")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, of_head, rows), out_specs=(rows, rows), check_vma=False
    )
    def split(hidden, head, targets):
        return vocabulary.logprobs_and_entropy(hidden, vocabulary.rows(head), targets, 0.7)

    for got, want in zip(split(hidden, head, targets), _full(hidden, head, targets, 0.7), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
