"""Attention of packed rows: each implementation against the rule of segments written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.model import attention, blockwise
from ngrpo_jax.model.attention import Segments

T, H = 40, 8
# (length, id of the prefix) of each segment along the row; what is left is padding.
LAYOUTS = {
    "one": [(40, 0)],
    "packed": [(3, 0), (17, 0), (1, 0), (12, 0)],
    "shared": [(7, 0), (9, 1), (1, 1), (5, 0), (8, 4), (6, 4)],
}


def _segments(*names):
    own, prefix = np.zeros((2, len(names), T), np.int32)
    for row, name in enumerate(names):
        start = 0
        for index, (length, of_prefix) in enumerate(LAYOUTS[name], start=1):
            own[row, start : start + length], prefix[row, start : start + length] = index, of_prefix
            start += length
    return Segments(jnp.asarray(own), jnp.asarray(prefix))


def _inputs(rows, heads, kv_heads, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, T, n, H) for n in (heads, kv_heads, kv_heads, heads)]
    return [2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def _oracle(q, k, v, segments):
    """Token by token in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    own, prefix = (np.asarray(x) for x in segments)
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t in np.ndindex(own.shape):
        attended = [
            s
            for s in range(t + 1)
            if own[b, s] == own[b, t] or (prefix[b, t] > 0 and own[b, s] == prefix[b, t])
        ]
        for n in range(q.shape[2]):
            scores = k[b, attended, n // group] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, attended, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize(("name", "block"), [("plain", 0), ("chunked", 8), ("chunked", 16), ("chunked", 64)])
def test_every_token_attends_to_its_segment_and_its_prefix_up_to_itself(name, block, heads):
    segments = _segments(*LAYOUTS)
    q, k, v, _ = _inputs(len(LAYOUTS), *heads)
    attend = attention.make(name, "cpu", block=block)
    out = np.asarray(jax.jit(attend)(q, k, v, segments))
    real = np.asarray(segments.own) > 0
    np.testing.assert_allclose(out[real], _oracle(q, k, v, segments)[real], rtol=1e-5, atol=1e-5)
    assert np.isfinite(out).all()


def _gradients(attend, segments, rows, heads):
    q, k, v, weight = _inputs(rows, *heads)
    weight = jnp.where((segments.own > 0)[..., None, None], weight, 0.0)
    total = lambda q, k, v: jnp.sum(weight * attend(q, k, v, segments))  # noqa: E731
    return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)


def _assert_close(got, want):
    for one, other in zip(got, want, strict=True):
        assert np.isfinite(one).all()
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


@pytest.mark.parametrize(("block", "band"), [(8, 1), (8, 4), (8, 100), (12, 4), (64, 4)])
def test_gradients_of_chunked_are_those_of_plain(block, band, monkeypatch):
    monkeypatch.setitem(blockwise.BANDS, "cpu", band)
    segments = _segments(*LAYOUTS)
    want = _gradients(attention.plain, segments, 3, (4, 2))
    _assert_close(_gradients(attention.make("chunked", "cpu", block=block), segments, 3, (4, 2)), want)


def test_the_kernel_for_tpus_agrees_where_it_is_interpreted():
    segments = _segments("one", "packed")
    q, k, v, _ = _inputs(2, 4, 2)
    attend = attention.make("splash", "tpu", interpret=True)
    out = np.asarray(attend(q, k, v, segments))
    real = np.asarray(segments.own) > 0
    np.testing.assert_allclose(out[real], _oracle(q, k, v, segments)[real], rtol=1e-5, atol=1e-5)
    _assert_close(_gradients(attend, segments, 2, (4, 2)), _gradients(attention.plain, segments, 2, (4, 2)))


@pytest.mark.parametrize(
    ("prefixes", "poisoned", "finite"),
    [
        ([0, 0, 0, 0], 0, [1, 2, 3]),  # segments of their own
        ([0, 0, 1, 0], 0, [1, 3]),  # block 2 attends to block 0
        ([0, 0, 1, 0], 1, [0, 2, 3]),  # ... and skips block 1, which is between them
        ([0, 0, 0, 0], 3, [0, 1, 2, 3]),  # padding, which attends to no block at all
    ],
)
def test_blocks_of_keys_without_a_common_segment_are_skipped(prefixes, poisoned, finite):
    """Values of one block are NaN, which even a weight of 0 would carry into the outputs of a block."""
    own, prefix = (jnp.repeat(jnp.asarray(ids), 8)[None] for ids in ([1, 2, 3, 0], prefixes))
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 32, 2, H)) for i in range(3))
    v = v.at[:, 8 * poisoned : 8 * poisoned + 8].set(jnp.nan)
    out = attention.make("chunked", "cpu", block=8)(q, k, v, Segments(own, prefix))
    of_blocks = np.isfinite(np.asarray(out).reshape(4, -1)).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(of_blocks), finite)


def _scratch(name, length):
    q, k = (jax.ShapeDtypeStruct((1, length, n, H), jnp.float32) for n in (4, 2))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    attend = attention.make(name, "cpu", block=64)
    total = lambda q, k, v, ids: jnp.sum(attend(q, k, v, Segments(ids, ids)))  # noqa: E731
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_chunked_never_holds_the_scores_of_a_row():
    assert _scratch("plain", 1024) > 4 * 4 * 1024**2
    assert _scratch("chunked", 1024) < 4 * 1024**2
    assert _scratch("chunked", 2048) < 2.5 * _scratch("chunked", 1024)


@pytest.mark.parametrize(
    ("platform", "row_tokens", "shared", "dtype", "chosen"),
    [
        ("cpu", 128, False, "bfloat16", "plain"),
        ("cpu", 1024, True, "bfloat16", "chunked"),
        ("gpu", 1024, False, "bfloat16", "cudnn"),
        ("gpu", 1024, False, "float32", "chunked"),
        ("gpu", 1025, False, "bfloat16", "chunked"),
        ("tpu", 1024, False, "float32", "splash"),
        ("tpu", 1024, True, "bfloat16", "chunked"),
    ],
)
def test_auto_chooses_by_platform_length_and_dtype(platform, row_tokens, shared, dtype, chosen):
    given = dict(platform=platform, row_tokens=row_tokens, shared_prefixes=shared, dtype=dtype)
    assert attention.choose("auto", **given) == chosen
    if chosen != "cudnn" and platform == "gpu":
        with pytest.raises(
            ValueError, match=f"'cudnn', which takes bfloat16 .* not {dtype} and {row_tokens}"
        ):
            attention.choose("cudnn", **given)


@pytest.mark.parametrize(
    ("name", "platform", "sentence"),
    [
        ("cudnn", "cpu", "train.attention is 'cudnn', which needs an NVIDIA GPU, but this run is on cpu"),
        ("splash", "gpu", "train.attention is 'splash', which needs a TPU, but this run is on gpu"),
        ("splash", "tpu", "cannot let responses share a prompt; set train.share_prompts to false"),
        ("fast", "cpu", "train.attention is 'fast'; it must be one of auto, plain, chunked"),
    ],
)
def test_what_cannot_run_is_refused_by_name(name, platform, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention.choose(name, platform=platform, row_tokens=1024, shared_prefixes=True, dtype="bfloat16")
