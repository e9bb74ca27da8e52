"""Attention of packed rows by pairs of blocks and a running softmax: memory grows with T, not T squared.

Owns "chunked", one of the ways of attention.py, and the rule of segments in one pair of tokens (`sees`).
Must not know the other ways, or what decides between them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # tokens of a block: on two CPU cores the best of 64 … 192
# Blocks of queries that are computed together. On two CPU cores 1 to 4 are alike and more is slower, for a
# batch of small products is no faster there than one after the other; elsewhere a device needs to be filled.
BANDS = {"cpu": 4, "gpu": 32, "tpu": 32}
MASKED = float(np.finfo(np.float32).min)
_NOBODY = -1  # a segment id that no token has or sees


def chunked(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments: tuple[Any, Any], *, block: int = BLOCK
) -> jax.Array:
    """Blocks of queries against blocks of keys with a running softmax (arXiv 2205.14135), empty ones skipped.

    Arguments as for `attention.make`; `segments` is an `attention.Segments`. The arrays are on one device.
    Blocks of queries, of all rows, are computed some at a time (BANDS), each going through the blocks of keys
    that it may see; a band takes as many turns as its longest list. Scores exist for one pair of blocks a
    block of queries, forward and backward.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    chex.assert_equal_shape([k_BTKH, v_BTKH])
    block = min(block, T)
    pad = -T % block
    count = (T + pad) // block
    # A block of queries holds, for each key head, the queries of its group one after the other: [K, G·b, H].
    q = _pad_time(q_BTNH, pad).reshape(B, count, block, K, N // K, H)
    q = q.transpose(0, 1, 3, 4, 2, 5).reshape(B, count, K, N // K * block, H)
    k, v = (
        _pad_time(x, pad).reshape(B, count, block, K, H).transpose(0, 1, 3, 2, 4) for x in (k_BTKH, v_BTKH)
    )
    own, prefix = (_pad_time(ids, pad).reshape(B, count, block) for ids in segments)
    out = _blockwise(q, k, v, own, prefix)
    out = out.reshape(B, count, K, N // K, block, H).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, T + pad, N, H)[:, :T]


def _pad_time(x_BT: jax.Array, pad: int) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, pad), *((0, 0),) * (x_BT.ndim - 2)))


def sees(own_Bt: jax.Array, prefix_Bt: jax.Array, keys_Bs: jax.Array) -> jax.Array:
    """bool [..., t, s]: same segment, or the key's segment is the query's prefix. Padding sees padding."""
    keys = keys_Bs[..., None, :]
    return (own_Bt[..., None] == keys) | ((prefix_Bt[..., None] == keys) & (keys > 0))


def _needed_blocks(own: jax.Array, prefix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the blocks of keys that it may see: (indices [B, n, n], how many [B, n]).

    Ids rise along the row, so a block's segments lie between its least and its largest; ranges that do not
    overlap have nothing to say to each other. Blocks of padding alone need none.
    """
    count = own.shape[1]
    last = jnp.iinfo(jnp.int32).max
    low, high = jnp.min(jnp.where(own > 0, own, last), axis=2), jnp.max(own, axis=2)
    prefix_low, prefix_high = jnp.min(jnp.where(prefix > 0, prefix, last), axis=2), jnp.max(prefix, axis=2)

    def overlap(from_Bn: jax.Array, to_Bn: jax.Array) -> jax.Array:
        return (from_Bn[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= to_Bn[:, :, None])

    causal = jnp.tril(jnp.ones((count, count), bool))[None]
    needed = causal & (overlap(low, high) | overlap(prefix_low, prefix_high))
    return jnp.argsort(~needed, axis=2, stable=True), jnp.sum(needed, axis=2)


def _scores(q: jax.Array, k: jax.Array, own, prefix, keys, i: jax.Array, j: jax.Array) -> jax.Array:
    """float32 [W, K, G·b, b] of W pairs of blocks, masked; i and j [W] are their places in the row."""
    W, K, queries, H = q.shape
    block = own.shape[1]
    scores = jnp.einsum("wkqh,wkth->wkqt", q, k, preferred_element_type=jnp.float32) * H**-0.5
    places = jnp.arange(block)
    ahead = (i - j)[:, None, None] * block  # of the block of queries, in tokens
    mask = (ahead + places[None, :, None] >= places[None, None, :]) & sees(own, prefix, keys)
    scores = scores.reshape(W, K, queries // block, block, block)
    return jnp.where(mask[:, None, None], scores, -jnp.inf).reshape(W, K, queries, block)


class _Band(NamedTuple):
    """Blocks of queries that are computed together, [W, ...]: what they are and what they may see."""

    row: jax.Array  # [W]
    place: jax.Array  # [W], in the row
    own: jax.Array  # [W, b]
    prefix: jax.Array  # [W, b]
    order: jax.Array  # [W, n] the blocks of keys to go through
    needed: jax.Array  # [W] how many of those; 0 for what fills the last band up

    def pair(self, n: jax.Array, own: jax.Array) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], Any]]:
        """Each block's n-th block of keys j [W], and the scores (q, k) -> [W, K, G·b, b] of the two."""
        j = self.order[:, n]
        # Who has gone through all of its own sees nothing more: ids below every other.
        keys = jnp.where((n < self.needed)[:, None], own[self.row, j], _NOBODY)

        def scores(q: jax.Array, k: jax.Array) -> jax.Array:
            return _scores(q, k[self.row, j], self.own, self.prefix, keys, self.place, j)

        return j, scores


def _bands(blocks: jax.Array) -> jax.Array:
    """[B, n, ...] -> [bands, W, ...]: neighbours together, filled up with zeros."""
    flat = blocks.reshape(-1, *blocks.shape[2:])
    bands = -(-len(flat) // BANDS[jax.default_backend()])
    width = -(-len(flat) // bands)
    filled = jnp.pad(flat, ((0, bands * width - len(flat)), *((0, 0),) * (flat.ndim - 1)))
    return filled.reshape(bands, width, *flat.shape[1:])


def _unbanded(banded: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
    """The inverse of `_bands`, for blocks [B, n]."""
    B, count = blocks
    return banded.reshape(-1, *banded.shape[2:])[: B * count].reshape(B, count, *banded.shape[2:])


def _layout(own: jax.Array, prefix: jax.Array) -> _Band:
    """All bands, each leaf with a leading dimension to scan over."""
    B, count, _ = own.shape
    order, needed = _needed_blocks(own, prefix)
    row, place = jnp.divmod(jnp.arange(B * count).reshape(B, count), count)
    return _Band(*map(_bands, (row, place, own, prefix, order, needed)))


@jax.custom_vjp
def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array, prefix: jax.Array) -> jax.Array:
    return _blockwise_forward(q, k, v, own, prefix)[0]


def _blockwise_forward(q, k, v, own, prefix):
    """q [B, n, K, G·b, H], k and v [B, n, K, b, H], ids [B, n, b] -> (out like q, what backward needs)."""

    def of_band(_, scanned):
        band, q_band = scanned

        def step(n, carry):
            high, total, out = carry
            j, scores_of = band.pair(n, own)
            scores = scores_of(q_band, k)
            higher = jnp.maximum(high, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(high - higher)
            add = jnp.einsum(
                "wkqt,wkth->wkqh", weights.astype(v.dtype), v[band.row, j], preferred_element_type=jnp.float32
            )
            return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + add

        # Starting from a finite least score keeps queries that see nothing in a block free of inf - inf.
        queries = q_band.shape[:3]
        start = (jnp.full(queries, MASKED), jnp.zeros(queries), jnp.zeros(q_band.shape, jnp.float32))
        high, total, out = jax.lax.fori_loop(0, jnp.max(band.needed), step, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, ((out / total[..., None]).astype(q.dtype), high + jnp.log(total))

    _, results = jax.lax.scan(of_band, None, (_layout(own, prefix), _bands(q)))
    out, log_total = (_unbanded(x, own.shape[:2]) for x in results)
    return out, (q, k, v, own, prefix, out, log_total)


def _blockwise_backward(saved, grad):
    q, k, v, own, prefix, out, log_total = saved
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # of Σ_s weight · d weight

    def of_band(to_keys_values, scanned):
        band, (q_band, grad_band, log_band, inner_band) = scanned

        def step(n, carry):
            to_q, to_k, to_v = carry
            j, scores_of = band.pair(n, own)
            weights = jnp.exp(scores_of(q_band, k) - log_band[..., None])
            to_weights = jnp.einsum(
                "wkqh,wkth->wkqt", grad_band, v[band.row, j], preferred_element_type=jnp.float32
            )
            to_scores = (weights * (to_weights - inner_band[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)

            def of_keys(x, y):
                return jnp.einsum("wkqt,wkqh->wkth", x, y, preferred_element_type=jnp.float32)

            to_q += jnp.einsum(
                "wkqt,wkth->wkqh", to_scores, k[band.row, j], preferred_element_type=jnp.float32
            )
            to_k = to_k.at[band.row, j].add(of_keys(to_scores, q_band))
            to_v = to_v.at[band.row, j].add(of_keys(weights.astype(q.dtype), grad_band))
            return to_q, to_k, to_v

        start = (jnp.zeros(q_band.shape, jnp.float32), *to_keys_values)
        to_q, *to_keys_values = jax.lax.fori_loop(0, jnp.max(band.needed), step, start)
        return tuple(to_keys_values), to_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    of_queries = tuple(map(_bands, (q, grad, log_total, inner)))
    (to_k, to_v), to_q = jax.lax.scan(of_band, (zeros, zeros), (_layout(own, prefix), of_queries))
    return _unbanded(to_q, own.shape[:2]), to_k.astype(k.dtype), to_v.astype(v.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
