"""The decoder laid out for writing: prefill and one-token steps as products of weights with columns.

The same model as decoder.py, from weights transposed and joined once a rollout (`lay_out`). A step multiplies
every weight by a few dozen vectors; as W [out, in] times x [in, rows], with the three projections of
attention and the two of the MLP joined, the weights stream through a processor's cache once and in order,
which on CPU takes up to 30 % less time than x · W does (benchmarks/bounds.py). So activations stand as
columns here: x_DM, M being rows, or rows times tokens. Nothing here is trained, and none of it is Flax.

Layout:
    embed/embedding [V, D]    head/rows [V, D] unless tied    final_norm/scale [D]    layers: a tuple of
        input_norm/scale [D]                  post_attention_norm/scale [D]
        attention/qkv/kernel [K, G+2, H, D]   bias [K, G+2, H] (Qwen2): of each key/value head, its G query
                                              heads, its key, its value
        attention/{q,k}_norm/scale [H]        (Qwen3)
        attention/o/kernel [D, K, G, H]       mlp/gate_up/kernel [2, F, D]      mlp/down/kernel [D, F]
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.mixture import Mixture, embed, one_hot
from ngrpo_jax.model import cache as kv
from ngrpo_jax.model.cache import KVCache
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import unstack_layers
from ngrpo_jax.model.layers import inverse_frequencies

Params = dict[str, Any]
Rope = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [H/2, M]
# (q [K, G, H, M], k and v [K, H, M]) -> (attention [K, G, H, M], the keys and values to be kept)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, jax.Array]]]

_MASKED = float(np.finfo(np.float32).min)
QUERY_BLOCK = 512  # queries of a prompt whose scores exist at once
SUMMED = 16  # terms of a run of `_product_by_sums`; 8 and 16 are equally fast, 4 and 32 are slower


def is_laid_out(params: Params) -> bool:
    """Whether `params` have been through `lay_out`."""
    layers = params["layers"]
    return isinstance(layers, tuple) and "qkv" in layers[0]["attention"]


@functools.partial(jax.jit, static_argnames="config")
def lay_out(params: Params, config: ModelConfig) -> Params:
    """The learner's parameters (decoder.py's, stacked or not), in the compute type and the layout above."""
    layers = unstack_layers(params)["layers"]
    laid_out = {
        "embed": params["embed"],
        "final_norm": params["final_norm"],
        "layers": tuple(_lay_out_layer(layer, config) for layer in layers),
    }
    if not config.tie_embeddings:
        laid_out["head"] = params["head"]
    return jax.tree.map(lambda leaf: leaf.astype(config.dtype), laid_out)


def _lay_out_layer(layer: Params, config: ModelConfig) -> Params:
    K, H, D = config.num_kv_heads, config.head_dim, config.hidden_size
    attention, mlp = layer["attention"], layer["mlp"]

    def joined(name: str, last: int) -> jax.Array:
        """[.., N, H] and twice [.., K, H] -> [K, G+2, H, ..]"""
        parts = [attention[part][name].reshape(-1, K, heads, H) for part, heads in _heads(config)]
        return jnp.moveaxis(jnp.concatenate(parts, axis=2), 0, last)

    qkv = {"kernel": joined("kernel", 3)}
    if config.qkv_bias:
        qkv["bias"] = joined("bias", 3)[..., 0]
    norms = {name: attention[name] for name in ("q_norm", "k_norm") if name in attention}
    output = attention["o"]["kernel"].reshape(K, -1, H, D)
    return {
        "input_norm": layer["input_norm"],
        "post_attention_norm": layer["post_attention_norm"],
        "attention": {"qkv": qkv, "o": {"kernel": jnp.moveaxis(output, 3, 0)}, **norms},
        "mlp": {
            "gate_up": {"kernel": jnp.stack([mlp[name]["kernel"].T for name in ("gate", "up")])},
            "down": {"kernel": mlp["down"]["kernel"].T},
        },
    }


def _heads(config: ModelConfig) -> tuple[tuple[str, int], ...]:
    return ("q", config.num_heads // config.num_kv_heads), ("k", 1), ("v", 1)


def prefill(
    params: Params, config: ModelConfig, ids_BT: jax.Array, lengths_B: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Reads right-padded prompts: (hidden_BD after each row's last token, a cache of T columns).

    What stands beyond a row's length has no influence; a row of length 0 gives a hidden state of no meaning.
    """
    B, T = ids_BT.shape
    chex.assert_shape(lengths_B, (B,))
    # As in a ring whose cursor is at 0: each prompt ends with the last column, padding comes first.
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None] - (T - lengths_B)[:, None]
    ids_BT = jnp.take_along_axis(ids_BT, jnp.maximum(positions_BT, 0), axis=1)
    x_DM = _embedded(params, config, one_hot(ids_BT.reshape(B * T), 1))
    rope = _rope(config, jnp.maximum(positions_BT, 0).reshape(B * T))
    attend = functools.partial(_attend_prompts, real_BT=positions_BT >= 0)
    kept = []
    for layer in params["layers"]:
        x_DM, seen = _layer(config, layer, x_DM, rope, attend)
        kept.append(seen)
    x_DB = x_DM.reshape(-1, B, T)[:, :, -1]
    keys, values = (tuple(arrays) for arrays in zip(*kept, strict=True))
    cache = KVCache(keys, values, lengths_B.astype(jnp.int32), jnp.zeros((), jnp.int32))
    return _norm(x_DB, params["final_norm"]["scale"], config).T, cache


def turns(config: ModelConfig, columns: int) -> Rope:
    """Rotary cosines and sines of all positions that a cache of so many columns has, for `decode_step`."""
    return _rope(config, jnp.arange(columns + 1))


def decode_step(
    params: Params, config: ModelConfig, inputs: Mixture, cache: KVCache, turned: Rope
) -> tuple[jax.Array, KVCache]:
    """Feeds one input per row, Mixture [B, C]: (hidden_BD, the cache one column on).

    The cache is written in place where it is donated or carried by a loop. A row that is full loses its
    oldest token, which spoils that row and no other. `turned` is `turns` of the cache's columns, made outside
    of the loop: inside, XLA would compute each cosine anew in every layer and head.
    """
    B = cache.lengths_B.shape[0]
    chex.assert_shape(inputs.ids, (B, None))
    chex.assert_shape(turned, (config.head_dim // 2, cache.columns + 1))
    x_DB = _embedded(params, config, inputs)
    cos, sin = (jnp.take(part, cache.lengths_B, axis=1, mode="clip") for part in turned)
    rope = cos, sin
    held_BS = kv.held(cache.lengths_B, cache.cursor, cache.columns)
    kept = []
    for layer, own_keys, own_values in zip(params["layers"], cache.keys, cache.values, strict=True):
        attend = functools.partial(
            _attend_cache, keys=own_keys, values=own_values, held_BS=held_BS, cursor=cache.cursor
        )
        x_DB, seen = _layer(config, layer, x_DB, rope, attend)
        kept.append(seen)
    keys, values = (tuple(arrays) for arrays in zip(*kept, strict=True))
    cache = kv.advanced(cache._replace(keys=keys, values=values))
    return _norm(x_DB, params["final_norm"]["scale"], config).T, cache


def logits(params: Params, hidden_BD: jax.Array) -> jax.Array:
    """float32 [B, V]."""
    rows_VD = params["head"]["rows"] if "head" in params else params["embed"]["embedding"]
    return jnp.einsum("vd,bd->vb", rows_VD, hidden_BD, preferred_element_type=jnp.float32).T


def table_rows(params: Params, table: str) -> jax.Array:
    """The rows [V, D] among which neighbours are sought: of the input "embedding", or of the "head"."""
    if table == "head" and "head" in params:
        return params["head"]["rows"]
    return params["embed"]["embedding"]


def _layer(
    config: ModelConfig, layer: Params, x_DM: jax.Array, rope: Rope, attend: Attend
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Normalised attention and normalised MLP, each added to what came in; and what `attend` keeps."""
    group = config.num_heads // config.num_kv_heads
    attention, mlp = layer["attention"], layer["mlp"]
    normed = _norm(x_DM, layer["input_norm"]["scale"], config)
    qkv = jnp.einsum("kjhd,dm->kjhm", attention["qkv"]["kernel"], normed)
    if "bias" in attention["qkv"]:
        qkv = qkv + attention["qkv"]["bias"][..., None]
    q, k, v = qkv[:, :group], qkv[:, group : group + 1], qkv[:, group + 1]
    if "q_norm" in attention:
        q = _norm(q, attention["q_norm"]["scale"], config)
        k = _norm(k, attention["k_norm"]["scale"], config)
    out, kept = attend(_rotated(q, rope), _rotated(k, rope)[:, 0], v)
    # As one matrix: with the three dimensions apart, XLA transposes the weight at every step.
    output = attention["o"]["kernel"].reshape(config.hidden_size, -1)
    x_DM = x_DM + jnp.einsum("dn,nm->dm", output, out.reshape(output.shape[1], -1))
    normed = _norm(x_DM, layer["post_attention_norm"]["scale"], config)
    gate, up = jnp.einsum("tfd,dm->tfm", mlp["gate_up"]["kernel"], normed)
    return x_DM + jnp.einsum("df,fm->dm", mlp["down"]["kernel"], jax.nn.silu(gate) * up), kept


def _attend_cache(
    q_KGHB: jax.Array,
    k_KHB: jax.Array,
    v_KHB: jax.Array,
    *,
    keys: jax.Array,
    values: jax.Array,
    held_BS: jax.Array,
    cursor: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One query per row over the row's cache, into which its own key and value are written first."""
    k_BKH, v_BKH = (jnp.moveaxis(x, -1, 0) for x in (k_KHB, v_KHB))
    keys_BKHS, values_BKSH = kv.write(keys, values, k_BKH, v_BKH, cursor)
    scores = _product(jnp.moveaxis(q_KGHB, -1, 0), keys_BKHS)
    weights = _softmax(scores, held_BS[:, None, None], q_KGHB.shape[2]).astype(values.dtype)
    out_BKGH = _product(weights, values_BKSH).astype(values.dtype)
    return jnp.moveaxis(out_BKGH, 0, -1), (keys_BKHS, values_BKSH)


def _product(x_BKGC: jax.Array, y_BKCN: jax.Array) -> jax.Array:
    """Σ_c x[b, k, g, c] · y[b, k, c, n] in float32: queries by keys, or weights by values."""
    return jax.lax.platform_dependent(x_BKGC, y_BKCN, cpu=_product_by_sums, default=_product_by_dot)


def _product_by_dot(x_BKGC: jax.Array, y_BKCN: jax.Array) -> jax.Array:
    return jnp.einsum("bkgc,bkcn->bkgn", x_BKGC, y_BKCN, preferred_element_type=jnp.float32)


def _product_by_sums(x_BKGC: jax.Array, y_BKCN: jax.Array) -> jax.Array:
    """The same as sums, which XLA spreads over cores; a batch of small products it keeps on one.

    All G queries are summed in one reduction, so that y is read once; in runs of SUMMED, which XLA writes
    out and computes for many n at a time.
    """
    B, K, G, C = x_BKGC.shape
    run = math.gcd(SUMMED, C)
    x_BKGRU1 = x_BKGC.astype(jnp.float32).reshape(B, K, G, C // run, run, 1)
    y_BKRUN = y_BKCN.astype(jnp.float32).reshape(B, K, C // run, run, -1)
    terms = tuple(x_BKGRU1[:, :, g] * y_BKRUN for g in range(G))
    zeros = (jnp.zeros((), jnp.float32),) * G
    sums = jax.lax.reduce(terms, zeros, lambda left, right: tuple(map(jnp.add, left, right)), (3,))
    return jnp.stack([jnp.sum(sum_BKRN, axis=2) for sum_BKRN in sums], axis=2)


def _attend_prompts(
    q_KGHM: jax.Array, k_KHM: jax.Array, v_KHM: jax.Array, *, real_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Causal attention within each prompt, a block of queries at a time; keeps keys and values as a cache."""
    B, T = real_BT.shape
    H = q_KGHM.shape[2]
    q = jnp.moveaxis(q_KGHM.reshape(*q_KGHM.shape[:3], B, T), 3, 0)  # [B, K, G, H, T]
    keys_BKHT = jnp.moveaxis(k_KHM.reshape(*k_KHM.shape[:2], B, T), 2, 0)
    values_BKTH = jnp.transpose(v_KHM.reshape(*v_KHM.shape[:2], B, T), (2, 0, 3, 1))
    outs = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        seen_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        mask = (seen_TS[None] & real_BT[:, None, :stop])[:, None, None]
        scores = jnp.einsum(
            "bkght,bkhs->bkgts",
            q[..., start:stop],
            keys_BKHT[..., :stop],
            preferred_element_type=jnp.float32,
        )
        weights = _softmax(scores, mask, H).astype(values_BKTH.dtype)
        outs.append(jnp.einsum("bkgts,bksh->kghbt", weights, values_BKTH[:, :, :stop]))
    return jnp.concatenate(outs, axis=-1).reshape(q_KGHM.shape), (keys_BKHT, values_BKTH)


def _softmax(scores: jax.Array, mask: jax.Array, head_dim: int) -> jax.Array:
    """float32 weights over the last axis; a finite stand-in for -inf, so that an empty mask gives no NaN."""
    return jax.nn.softmax(jnp.where(mask, scores * head_dim**-0.5, _MASKED), axis=-1)


def _embedded(params: Params, config: ModelConfig, inputs: Mixture) -> jax.Array:
    """Mixtures [M, C] -> [D, M]."""
    return embed(params["embed"]["embedding"], inputs).astype(config.dtype).T


def _rope(config: ModelConfig, positions_M: jax.Array) -> Rope:
    angles = jnp.asarray(inverse_frequencies(config))[:, None] * positions_M.astype(jnp.float32)[None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotated(x_KJHM: jax.Array, rope: Rope) -> jax.Array:
    """Entry i of every head with entry i + H/2 ("rotate half", as layers.rotate)."""
    cos, sin = (part[None, None] for part in rope)
    first, second = jnp.split(x_KJHM.astype(jnp.float32), 2, axis=2)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)
    return rotated.astype(x_KJHM.dtype)


def _norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """RMSNorm over the last axis but one (width or head size), float32 inside: x [..., D, M]."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-2, keepdims=True) + config.norm_eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 2) + (-1, 1))
    return (wide * scale).astype(config.dtype)
