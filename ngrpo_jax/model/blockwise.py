"""Attention of packed rows by pairs of blocks and a running softmax: memory grows with T, not T squared.

Owns "chunked", one of the implementations of attention.py, and the rule of segments for pairs of tokens
(`attends`). Must not know the other implementations, or how one is chosen.

Letters of this file: Y blocks of a row, t tokens of a block of keys, J query heads of a key/value head, q the
J·t queries of a block for one key/value head, W blocks of queries of a band.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # tokens of a block: on two CPU cores the best of 64 … 192
# Blocks of queries that are computed together. On a CPU a batch of small products is no faster than one after
# the other, and a single block stops at the end of its own list; other devices need larger products.
BANDS = {"cpu": 1, "gpu": 32, "tpu": 32}
MASKED = float(np.finfo(np.float32).min)
_NO_SEGMENT = -1  # an id that is no token's segment and no token's prefix


def chunked(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: tuple[Any, Any],
    *,
    block: int = BLOCK,
    width: int = BANDS["cpu"],
) -> jax.Array:
    """Blocks of queries against blocks of keys with a running softmax (arXiv 2205.14135), empty ones skipped.

    Arguments as for `attention.Attend`; the arrays are on one device. Blocks of queries, of all rows, are
    computed in bands of at most `width`: each block has a list of the blocks of keys that it may attend to,
    and a band runs as many iterations as its longest list. Scores exist for one pair of blocks a block of
    queries, forward and backward.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    chex.assert_equal_shape([k_BTKH, v_BTKH])
    block = min(block, T)
    pad = -T % block
    count = (T + pad) // block
    # A block of queries holds, for each key/value head, the queries of its J heads one after the other.
    q = _pad_time(q_BTNH, pad).reshape(B, count, block, K, N // K, H)
    q_BYKqH = q.transpose(0, 1, 3, 4, 2, 5).reshape(B, count, K, N // K * block, H)
    k_BYKtH, v_BYKtH = (
        _pad_time(x, pad).reshape(B, count, block, K, H).transpose(0, 1, 3, 2, 4) for x in (k_BTKH, v_BTKH)
    )
    own_BYt, prefix_BYt = (_pad_time(ids, pad).reshape(B, count, block) for ids in segments)
    out = _blockwise(q_BYKqH, k_BYKtH, v_BYKtH, own_BYt, prefix_BYt, width)
    out = out.reshape(B, count, K, N // K, block, H).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, T + pad, N, H)[:, :T]


def _pad_time(x_BT: jax.Array, pad: int) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, pad), *((0, 0),) * (x_BT.ndim - 2)))


def attends(own_Bt: jax.Array, prefix_Bt: jax.Array, keys_Bs: jax.Array) -> jax.Array:
    """bool [..., t, s]: the key's segment is the query's own or its prefix. Padding attends to padding."""
    keys = keys_Bs[..., None, :]
    return (own_Bt[..., None] == keys) | ((prefix_Bt[..., None] == keys) & (keys > 0))


def _needed_blocks(own_BYt: jax.Array, prefix_BYt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the blocks of keys that it may attend to: (indices [B, Y, Y], count [B, Y]).

    Ids rise along the row, so a block's segments lie between its least and its largest id; blocks whose
    ranges do not overlap have no common segment. Blocks of padding alone need no block.
    """
    count = own_BYt.shape[1]
    last = jnp.iinfo(jnp.int32).max

    def id_range(ids_BYt: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(jnp.where(ids_BYt > 0, ids_BYt, last), axis=2), jnp.max(ids_BYt, axis=2)

    low_BY, high_BY = id_range(own_BYt)

    def overlap(from_BY: jax.Array, to_BY: jax.Array) -> jax.Array:
        return (from_BY[:, :, None] <= high_BY[:, None, :]) & (low_BY[:, None, :] <= to_BY[:, :, None])

    causal = jnp.tril(jnp.ones((count, count), bool))[None]
    needed = causal & (overlap(low_BY, high_BY) | overlap(*id_range(prefix_BYt)))
    return jnp.argsort(~needed, axis=2, stable=True), jnp.sum(needed, axis=2)


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


class _Band(NamedTuple):
    """W blocks of queries that are computed together, and the blocks of keys that they may attend to."""

    row_W: jax.Array
    position_Wq: jax.Array  # of each query, in the row
    own_Wq: jax.Array
    prefix_Wq: jax.Array
    order_WY: jax.Array  # the blocks of keys, the needed ones first
    needed_W: jax.Array  # how many are needed; 0 for the blocks that pad the last band

    def pair(self, n: jax.Array, own_BYt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The index in its row of each block's n-th block of keys [W], and the attention mask [W, q, t]."""
        index_W, block = self.order_WY[:, n], own_BYt.shape[2]
        # A block whose list has ended attends to no token: no query has this id.
        keys_Wt = jnp.where((n < self.needed_W)[:, None], own_BYt[self.row_W, index_W], _NO_SEGMENT)
        key_position_Wt = index_W[:, None] * block + jnp.arange(block)[None]
        causal_Wqt = self.position_Wq[:, :, None] >= key_position_Wt[:, None, :]
        return index_W, causal_Wqt & attends(self.own_Wq, self.prefix_Wq, keys_Wt)


def _bands(blocks: jax.Array, band: int) -> jax.Array:
    """[B, Y, ...] -> [bands, W, ...]: consecutive blocks together, the last band padded with zeros."""
    flat = blocks.reshape(-1, *blocks.shape[2:])
    bands = -(-len(flat) // band)
    width = -(-len(flat) // bands)
    padded = jnp.pad(flat, ((0, bands * width - len(flat)), *((0, 0),) * (flat.ndim - 1)))
    return padded.reshape(bands, width, *flat.shape[1:])


def _unbanded(banded: jax.Array, shape_BY: tuple[int, ...]) -> jax.Array:
    """The inverse of `_bands`: [B, Y, ...]."""
    B, count = shape_BY
    return banded.reshape(-1, *banded.shape[2:])[: B * count].reshape(B, count, *banded.shape[2:])


def _layout(own_BYt: jax.Array, prefix_BYt: jax.Array, heads: int, band: int) -> _Band:
    """All bands, each leaf with a leading dimension to scan over; ids repeated for each of J heads."""
    B, count, block = own_BYt.shape
    order, needed = _needed_blocks(own_BYt, prefix_BYt)
    row_BY = jnp.broadcast_to(jnp.arange(B)[:, None], (B, count))
    position_BYt = jnp.broadcast_to(jnp.arange(count * block).reshape(1, count, block), own_BYt.shape)
    of_queries = (jnp.tile(x, (1, 1, heads)) for x in (position_BYt, own_BYt, prefix_BYt))
    return _Band(*(_bands(x, band) for x in (row_BY, *of_queries, order, needed)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(
    q_BYKqH: jax.Array,
    k_BYKtH: jax.Array,
    v_BYKtH: jax.Array,
    own_BYt: jax.Array,
    prefix_BYt: jax.Array,
    width: int,
) -> jax.Array:
    return _blockwise_forward(q_BYKqH, k_BYKtH, v_BYKtH, own_BYt, prefix_BYt, width)[0]


def _blockwise_forward(q, k, v, own, prefix, width):
    """(output like q, what the backward pass needs); arguments as for `_blockwise`."""
    scale, heads = q.shape[-1] ** -0.5, q.shape[3] // own.shape[2]

    def of_band(_, scanned):
        band, q_WKqH = scanned

        def step(n, carry):
            high, total, out = carry
            j, mask_Wqt = band.pair(n, own)
            scores = _product("wkqh,wkth->wkqt", q_WKqH, k[band.row_W, j]) * scale
            scores = jnp.where(mask_Wqt[:, None], scores, -jnp.inf)
            higher = jnp.maximum(high, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(high - higher)
            add = _product("wkqt,wkth->wkqh", weights.astype(v.dtype), v[band.row_W, j])
            return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + add

        # A finite least score to start from: a query masked from a whole block would give inf - inf.
        shape = q_WKqH.shape[:3]
        start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q_WKqH.shape, jnp.float32))
        high, total, out = jax.lax.fori_loop(0, jnp.max(band.needed_W), step, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, ((out / total[..., None]).astype(q.dtype), high + jnp.log(total))

    _, results = jax.lax.scan(of_band, None, (_layout(own, prefix, heads, width), _bands(q, width)))
    out, log_total = (_unbanded(x, own.shape[:2]) for x in results)
    return out, (q, k, v, own, prefix, out, log_total)


def _blockwise_backward(width, saved, grad):
    """Weights are [t, q] here and the gradient of q is [H, q], so that no product has to transpose a result
    of this loop: on a CPU that takes as long as the product itself. Keys are transposed once, before it."""
    q, k, v, own, prefix, out, log_total = saved
    scale, heads = q.shape[-1] ** -0.5, q.shape[3] // own.shape[2]
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # Σ_s weight · d weight
    k_BYKHt = k.swapaxes(-1, -2)

    def of_band(to_keys_values, scanned):
        band, (q_band, grad_band, log_band, inner_band) = scanned

        def step(n, carry):
            to_q, to_k, to_v = carry
            j, mask_Wqt = band.pair(n, own)
            scores = _product("wkth,wkqh->wktq", k[band.row_W, j], q_band) * scale
            scores = jnp.where(mask_Wqt.swapaxes(1, 2)[:, None], scores, -jnp.inf)
            weights = jnp.exp(scores - log_band[:, :, None])
            to_weights = _product("wkth,wkqh->wktq", v[band.row_W, j], grad_band)
            to_scores = (weights * (to_weights - inner_band[:, :, None]) * scale).astype(q.dtype)
            to_q += _product("wkht,wktq->wkhq", k_BYKHt[band.row_W, j], to_scores)
            to_k = to_k.at[band.row_W, j].add(_product("wktq,wkqh->wkth", to_scores, q_band))
            to_v = to_v.at[band.row_W, j].add(_product("wktq,wkqh->wkth", weights.astype(q.dtype), grad_band))
            return to_q, to_k, to_v

        start = (jnp.zeros_like(q_band.swapaxes(-1, -2), jnp.float32), *to_keys_values)
        to_q, *to_keys_values = jax.lax.fori_loop(0, jnp.max(band.needed_W), step, start)
        return tuple(to_keys_values), to_q.swapaxes(-1, -2).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    of_queries = tuple(_bands(x, width) for x in (q, grad, log_total, inner))
    (to_k, to_v), to_q = jax.lax.scan(
        of_band, (zeros, zeros), (_layout(own, prefix, heads, width), of_queries)
    )
    return _unbanded(to_q, own.shape[:2]), to_k.astype(k.dtype), to_v.astype(v.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
