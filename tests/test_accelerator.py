"""What only an accelerator can show; skipped on CPU.

    NGRPO_TEST_PLATFORM=cuda,cpu python -m pytest tests/test_accelerator.py        (or tpu,cpu)

Needs jax, flax, optax and chex alone, as benchmarks/accelerator.py does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.algo.logprobs import token_logprobs
from ngrpo_jax.algo.mixture import Mixing, Mixture
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.model import attention, decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import engine

PLATFORM = jax.devices()[0].platform
pytestmark = pytest.mark.skipif(PLATFORM == "cpu", reason="needs a GPU or TPU: see the head of this file")

T, H = 512, 64
CONFIG = ModelConfig("qwen2", 512, 128, 256, 2, 4, 2, 32, tie_embeddings=True)
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [20] * 11]


def _segments(name):
    """Four rows [4, T] that nothing, borders, padding, or a shared prompt divide."""
    own, prefix = np.ones((4, T), np.int32), np.zeros((4, T), np.int32)
    if name != "one":
        for row, cuts in enumerate([(100, 300), (1, 511), (256,), (37, 38, 400)]):
            for cut in cuts:
                own[row, cut:] += 1
    if name == "padded":
        own[0, 300:], own[2, 256:] = 0, 0
    if name == "shared":
        prefix = np.where(own > 1, 1, 0).astype(np.int32)
    return attention.Segments(jnp.asarray(own), jnp.asarray(prefix))


@pytest.mark.parametrize("name", ["one", "packed", "padded", "shared"])
def test_the_fused_attention_is_that_of_plain_and_so_are_its_gradients(name):
    """In bfloat16, against the same numbers in float32: apart by what rounding to 8 bits explains."""
    if PLATFORM == "tpu" and name == "shared":
        pytest.skip("splash is refused for rows with shared prompts")
    segments = _segments(name)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(4, T, heads, H) for heads in (6, 2, 2, 6)]
    q, k, v, weight = (
        jax.random.normal(*given).astype(jnp.bfloat16) for given in zip(keys, shapes, strict=True)
    )
    weight = jnp.where((segments.own > 0)[..., None, None], weight, 0)
    chosen = attention.choose(
        "auto", platform=PLATFORM, row_tokens=T, shared_prefixes=name == "shared", dtype="bfloat16"
    )
    assert chosen == {"gpu": "cudnn", "tpu": "splash"}[PLATFORM]

    def results(attend, dtype):
        def total(q, k, v):
            out = attend(q, k, v, segments)
            return jnp.sum((weight * out).astype(jnp.float32)), out

        grad = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
        gradients, out = grad(*(x.astype(dtype) for x in (q, k, v)))
        return [jnp.where((segments.own > 0)[..., None, None], out, 0), *gradients]

    fused = results(attention.make(chosen, PLATFORM), jnp.bfloat16)
    for got, want in zip(fused, results(attention.plain, jnp.float32), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.isfinite(got).all()
        assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("metric", ["cosine", "l2", "l1", "dot"])
def test_the_neighbour_table_is_exact_eq7_eq8(metric):
    """By tiles, against float64; scores within 1e-6 of each other, or of their size, count as ties."""
    rows = np.random.default_rng(0).normal(size=(9000, 48)).astype(np.float32)
    rows[4000:4020] = rows[17]
    table = np.asarray(neighbor_table(rows, 4, metric=metric))
    wide = rows.astype(np.float64)
    if metric == "cosine":
        wide = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    for anchor in [0, 17, 4005, *range(100, 8900, 400)]:
        if metric in ("cosine", "dot"):
            scores = wide @ wide[anchor]
        else:
            apart = np.abs(wide - wide[anchor])
            scores = -(apart.sum(1) if metric == "l1" else (apart**2).sum(1))
        scores[anchor] = np.inf
        best = np.argsort(-scores, kind="stable")[:4]
        assert table[anchor, 0] == anchor
        np.testing.assert_allclose(scores[table[anchor, 1:]], scores[best[1:]], rtol=1e-6, atol=1e-6)
        if anchor in (17, 4005):
            np.testing.assert_array_equal(table[anchor], best)


def _params():
    """Logits lively enough that tokens vary."""
    params = decoder.init(jax.random.key(0), CONFIG)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def _generate(params, **changes):
    options = dict(samples=6, max_new_tokens=40, temperature=0.9, stop_ids=(1, 2), seed=5) | changes
    return engine.generate(params, CONFIG, PROMPTS, mixing=Mixing(rate=0.3, k=3), **options)


def test_rollout_logprobs_equal_replayed_ones():
    params = _params()
    written = _generate(params, slots=4, chunk=8)
    assert written.mixed_BT.any()
    hidden = jax.jit(decoder.hidden_states, static_argnums=1)
    for row in range(len(written.lengths_B)):
        prompt, length = PROMPTS[row // 6], written.lengths_B[row]
        C = written.mixtures.ids.shape[-1]
        ids = np.zeros((1, 64, C), np.int32)
        weights = np.zeros((1, 64, C), np.float32)
        ids[0, : len(prompt), 0], weights[0, : len(prompt), 0] = prompt, 1.0
        after = slice(len(prompt), len(prompt) + length)
        ids[0, after] = written.mixtures.ids[row, :length]
        weights[0, after] = written.mixtures.weights[row, :length]
        targets = np.zeros((1, 64), np.int32)
        targets[0, len(prompt) - 1 : len(prompt) - 1 + length] = written.tokens_BT[row, :length]
        states = hidden(params, CONFIG, Mixture(jnp.asarray(ids), jnp.asarray(weights)))
        replayed, _ = token_logprobs(states, decoder.head(params, CONFIG), jnp.asarray(targets), 0.9)
        got = np.asarray(replayed)[0, len(prompt) - 1 : len(prompt) - 1 + length]
        np.testing.assert_allclose(got, written.logprobs_BT[row, :length], atol=1e-4)


@pytest.mark.parametrize(("slots", "chunk"), [(4, 32), (16, 8), (16, 32)])
def test_tokens_do_not_depend_on_slots_or_chunk(slots, chunk):
    params = _params()
    one, other = _generate(params, slots=4, chunk=8), _generate(params, slots=slots, chunk=chunk)
    np.testing.assert_array_equal(one.tokens_BT, other.tokens_BT)
    np.testing.assert_array_equal(one.lengths_B, other.lengths_B)
    np.testing.assert_allclose(one.logprobs_BT, other.logprobs_BT, atol=1e-4)


def test_full_forward_is_that_of_the_cpu():
    """float32 with full products: the model, log-probabilities and gradients of both platforms."""
    params = _params()
    ids = np.random.default_rng(1).integers(CONFIG.vocab_size, size=(3, 48)).astype(np.int32)

    def total(params, ids):
        states = decoder.hidden_states(params, CONFIG, Mixture(ids[..., None], jnp.ones((*ids.shape, 1))))
        logprobs, entropy = token_logprobs(states, decoder.head(params, CONFIG), jnp.roll(ids, -1, 1), 0.9)
        return jnp.sum(logprobs + 0.1 * entropy)

    both = []
    for device in (jax.devices()[0], jax.local_devices(backend="cpu")[0]):
        placed = jax.device_put((params, ids), device)
        both.append(jax.device_get(jax.jit(jax.value_and_grad(total))(*placed)))
    (here, grads), (there, wanted) = both
    np.testing.assert_allclose(here, there, rtol=1e-6)
    whole = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(wanted)))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * max(np.linalg.norm(want), 1e-3 * whole)
