"""Attention of packed rows by pairs of blocks and a running softmax: memory grows with T, not T squared.

Owns "chunked", one of the ways of attention.py, and the rule of segments in one pair of tokens (`sees`).
Must not know the other ways, or what decides between them.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # tokens of a block: on two CPU cores the best of 64 … 192
# Blocks of queries that are computed together. On a CPU a batch of small products is no faster than one after
# the other, and one block alone stops at the end of its own list; elsewhere a device needs to be filled.
BANDS = {"cpu": 1, "gpu": 32, "tpu": 32}
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


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


class _Band(NamedTuple):
    """Blocks of queries that are computed together, [W, ...]: what they are and what they may see."""

    row: jax.Array  # [W]
    place: jax.Array  # [W, G·b] of each query, in the row
    own: jax.Array  # [W, G·b]
    prefix: jax.Array  # [W, G·b]
    order: jax.Array  # [W, n] the blocks of keys to go through
    needed: jax.Array  # [W] how many of those; 0 for what fills the last band up

    def pair(self, n: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Each block's n-th block of keys [W], and which query sees which of its tokens, [W, G·b, b]."""
        j, block = self.order[:, n], own.shape[2]
        # Who has gone through all of its own sees nothing more: ids below every other.
        ids = jnp.where((n < self.needed)[:, None], own[self.row, j], _NOBODY)
        place_of_keys = j[:, None] * block + jnp.arange(block)[None]
        reached = self.place[:, :, None] >= place_of_keys[:, None, :]
        return j, reached & sees(self.own, self.prefix, ids)


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


def _layout(own: jax.Array, prefix: jax.Array, group: int) -> _Band:
    """All bands, each leaf with a leading dimension to scan over; ids once for each of G heads."""
    B, count, block = own.shape
    order, needed = _needed_blocks(own, prefix)
    row = jnp.broadcast_to(jnp.arange(B)[:, None], (B, count))
    place = jnp.broadcast_to(jnp.arange(count * block).reshape(1, count, block), own.shape)
    of_queries = (jnp.tile(ids, (1, 1, group)) for ids in (place, own, prefix))
    return _Band(*map(_bands, (row, *of_queries, order, needed)))


@jax.custom_vjp
def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array, prefix: jax.Array) -> jax.Array:
    return _blockwise_forward(q, k, v, own, prefix)[0]


def _blockwise_forward(q, k, v, own, prefix):
    """q [B, n, K, G·b, H], k and v [B, n, K, b, H], ids [B, n, b] -> (out like q, what backward needs)."""
    scale, group = q.shape[-1] ** -0.5, q.shape[3] // own.shape[2]

    def of_band(_, scanned):
        band, q_band = scanned

        def step(n, carry):
            high, total, out = carry
            j, seen = band.pair(n, own)
            scores = _product("wkqh,wkth->wkqt", q_band, k[band.row, j]) * scale
            scores = jnp.where(seen[:, None], scores, -jnp.inf)
            higher = jnp.maximum(high, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(high - higher)
            add = _product("wkqt,wkth->wkqh", weights.astype(v.dtype), v[band.row, j])
            return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + add

        # Starting from a finite least score keeps queries that see nothing in a block free of inf - inf.
        queries = q_band.shape[:3]
        start = (jnp.full(queries, MASKED), jnp.zeros(queries), jnp.zeros(q_band.shape, jnp.float32))
        high, total, out = jax.lax.fori_loop(0, jnp.max(band.needed), step, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, ((out / total[..., None]).astype(q.dtype), high + jnp.log(total))

    _, results = jax.lax.scan(of_band, None, (_layout(own, prefix, group), _bands(q)))
    out, log_total = (_unbanded(x, own.shape[:2]) for x in results)
    return out, (q, k, v, own, prefix, out, log_total)


def _blockwise_backward(saved, grad):
    """Weights stand here as [keys, queries] and d q as [H, queries], so that no product has to transpose what
    was just computed: on a CPU that takes as long as the product itself. Keys are transposed once, before."""
    q, k, v, own, prefix, out, log_total = saved
    scale, group = q.shape[-1] ** -0.5, q.shape[3] // own.shape[2]
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # of Σ_s weight · d weight
    k_HT = k.swapaxes(-1, -2)

    def of_band(to_keys_values, scanned):
        band, (q_band, grad_band, log_band, inner_band) = scanned

        def step(n, carry):
            to_q, to_k, to_v = carry
            j, seen = band.pair(n, own)
            scores = _product("wkth,wkqh->wktq", k[band.row, j], q_band) * scale
            scores = jnp.where(seen.swapaxes(1, 2)[:, None], scores, -jnp.inf)
            weights = jnp.exp(scores - log_band[:, :, None])
            to_weights = _product("wkth,wkqh->wktq", v[band.row, j], grad_band)
            to_scores = (weights * (to_weights - inner_band[:, :, None]) * scale).astype(q.dtype)
            to_q += _product("wkht,wktq->wkhq", k_HT[band.row, j], to_scores)
            to_k = to_k.at[band.row, j].add(_product("wktq,wkqh->wkth", to_scores, q_band))
            to_v = to_v.at[band.row, j].add(_product("wktq,wkqh->wkth", weights.astype(q.dtype), grad_band))
            return to_q, to_k, to_v

        start = (jnp.zeros_like(q_band.swapaxes(-1, -2), jnp.float32), *to_keys_values)
        to_q, *to_keys_values = jax.lax.fori_loop(0, jnp.max(band.needed), step, start)
        return tuple(to_keys_values), to_q.swapaxes(-1, -2).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    of_queries = tuple(map(_bands, (q, grad, log_total, inner)))
    (to_k, to_v), to_q = jax.lax.scan(of_band, (zeros, zeros), (_layout(own, prefix, group), of_queries))
    return _unbanded(to_q, own.shape[:2]), to_k.astype(k.dtype), to_v.astype(v.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
