"""Attention of the inference pass: one query a row over the cache, and a whole prompt over itself.

Owns both and the arithmetic that suits a platform. Must not know layers, projections, or where a state has
its tokens (inference.py).

Letters of this file: Q query heads of a key/value head; E entries of a product that are summed, Y that are
kept; Z runs of W entries each.
"""

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ngrpo_jax.model import cache as kv
from ngrpo_jax.model.blockwise import MASKED

KeysValues = tuple[jax.Array, jax.Array]  # of one layer, as a KVCache holds them
# (q [B, K, Q, H], a layer's keys and values) -> attention [B, K, Q, H], in the dtype of the values
CacheAttention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

QUERY_BLOCK = 512  # queries of a prompt whose scores exist at once
RUN = 16  # entries of a run of `_product_by_sums`; 8 and 16 are equally fast, 4 and 32 are slower


def attend_to_cache(
    q_BKQH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    *,
    cached: KeysValues,
    cursor: jax.Array,
    attention: CacheAttention,
) -> tuple[jax.Array, KeysValues]:
    """One query per row over its cache, into which its own key and value are written at the cursor.

    Returns (attention [B, K, Q, H], the layer's cache), in the cache's dtype.
    """
    keys_BKHS, values_BKSH = kv.write(*cached, k_BKH, v_BKH, cursor)
    return attention(q_BKQH, keys_BKHS, values_BKSH), (keys_BKHS, values_BKSH)


def attend_to_valid(
    q_BKQH: jax.Array, keys_BKHS: jax.Array, values_BKSH: jax.Array, *, valid_BS: jax.Array, platform: str
) -> jax.Array:
    """One query per row over its valid columns: [B, K, Q, H]. All columns are read."""
    scores = product(q_BKQH, keys_BKHS, platform=platform)
    weights = _softmax(scores, valid_BS[:, None, None], q_BKQH.shape[3]).astype(values_BKSH.dtype)
    return product(weights, values_BKSH, platform=platform).astype(values_BKSH.dtype)


def attend_to_prompts(
    q_UKQH: jax.Array, k_UKH: jax.Array, v_UKH: jax.Array, *, real_BT: jax.Array
) -> tuple[jax.Array, KeysValues]:
    """Causal attention within each prompt, a block of queries at a time.

    Returns (attention [U, K, Q, H], the prompts' cache).

    Args:
      q_UKQH, k_UKH, v_UKH: of U = B · T tokens.
      real_BT: bool, tokens that are no padding.
    """
    B, T = real_BT.shape
    q_BKQHT, keys_BKHT, values_BKHT = (
        jnp.moveaxis(x.reshape(B, T, *x.shape[1:]), 1, -1) for x in (q_UKQH, k_UKH, v_UKH)
    )
    values_BKTH = jnp.swapaxes(values_BKHT, 2, 3)
    outs = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        causal_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        mask = (causal_TS[None] & real_BT[:, None, :stop])[:, None, None]
        scores = jnp.einsum(
            "bkqht,bkhs->bkqts",
            q_BKQHT[..., start:stop],
            keys_BKHT[..., :stop],
            preferred_element_type=jnp.float32,
        )
        weights = _softmax(scores, mask, q_BKQHT.shape[3]).astype(values_BKTH.dtype)
        outs.append(jnp.einsum("bkqts,bksh->kqhbt", weights, values_BKTH[:, :, :stop]))
    out_KQHU = jnp.concatenate(outs, axis=-1).reshape(*q_UKQH.shape[1:], B * T)
    return jnp.moveaxis(out_KQHU, -1, 0), (keys_BKHT, values_BKTH)


def _softmax(scores: jax.Array, mask: jax.Array, head_dim: int) -> jax.Array:
    """float32 weights over the last axis; a finite stand-in for -inf, so that an empty mask gives no NaN."""
    return jax.nn.softmax(jnp.where(mask, scores * head_dim**-0.5, MASKED), axis=-1)


def product(x_BKQE: jax.Array, y_BKEY: jax.Array, *, platform: str) -> jax.Array:
    """Σ_e x[b, k, q, e] · y[b, k, e, y] in float32: queries by keys, or weights by values."""
    if platform == "cpu":
        return _product_by_sums(x_BKQE, y_BKEY)
    return jnp.einsum("bkqe,bkey->bkqy", x_BKQE, y_BKEY, preferred_element_type=jnp.float32)


def _product_by_sums(x_BKQE: jax.Array, y_BKEY: jax.Array) -> jax.Array:
    """The same as reductions: XLA spreads those over the cores of a CPU, a batch of small products over none.

    All query heads are summed in one reduction, so that y is read once; in runs of RUN entries, which XLA
    unrolls and computes for many outputs at a time.
    """
    B, K, Q, E = x_BKQE.shape
    run = math.gcd(RUN, E)
    x_BKQZW1 = x_BKQE.astype(jnp.float32).reshape(B, K, Q, E // run, run, 1)
    y_BKZWY = y_BKEY.astype(jnp.float32).reshape(B, K, E // run, run, -1)
    terms = tuple(x_BKQZW1[:, :, q] * y_BKZWY for q in range(Q))
    zeros = (jnp.zeros((), jnp.float32),) * Q
    sums = jax.lax.reduce(terms, zeros, lambda left, right: tuple(map(jnp.add, left, right)), (3,))
    return jnp.stack([_total(sums_BKZY) for sums_BKZY in sums], axis=2)


def _total(sums_BKZY: jax.Array) -> jax.Array:
    """Σ_z. Few runs are added one by one, which XLA fuses with what comes next; many by a call of its own."""
    Z = sums_BKZY.shape[2]
    if Z > RUN:
        return jnp.sum(sums_BKZY, axis=2)
    return functools.reduce(operator.add, (sums_BKZY[:, :, z] for z in range(Z)))
