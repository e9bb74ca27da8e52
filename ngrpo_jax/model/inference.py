"""The decoder laid out for writing: prefill and one-token steps from weights joined once a rollout.

The same model as decoder.py. `to_inference_layout` stores every weight as [outputs, inputs], with the three
projections of attention and the two of the MLP joined, so that a step reads each weight once and in order.
The states of M tokens (rows of the cache, or rows times tokens of a prompt) lie as columns [D, M] or as
rows [M, D], as suits the machine: `token_axis`. Nothing here is trained, and none of it is Flax.

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
import operator
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ngrpo_jax.algo.mixture import Mixture, embed, one_hot
from ngrpo_jax.model import cache as kv
from ngrpo_jax.model.blockwise import MASKED
from ngrpo_jax.model.cache import KVCache
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import unstack_layers
from ngrpo_jax.model.layers import cosines_and_sines, inverse_frequencies

Params = dict[str, Any]
Rope = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [H/2], M along `token_axis`
# (q [K, G, H], k and v [K, H], M tokens along `token_axis`) -> (attention [K·G·H], keys and values to keep)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, jax.Array]]]

QUERY_BLOCK = 512  # queries of a prompt whose scores exist at once
SUMMED = 16  # terms of a run of `_product_by_sums`; 8 and 16 are equally fast, 4 and 32 are slower


def token_axis() -> int:
    """Where the states of M tokens have their tokens: [D, M] on CPU, [M, D] elsewhere.

    Columns make a step's products W · x, which is what a CPU is fastest at: with rows a step takes a fifth
    longer there. On an H100 rows take 2 to 9 % less (docs/performance.md).
    """
    return -1 if jax.default_backend() == "cpu" else 0


def is_inference_layout(params: Params) -> bool:
    """Whether `params` have been through `to_inference_layout`."""
    layers = params["layers"]
    return isinstance(layers, tuple) and "qkv" in layers[0]["attention"]


@functools.partial(jax.jit, static_argnames="config")
def to_inference_layout(params: Params, config: ModelConfig) -> Params:
    """The learner's parameters (decoder.py's, stacked or not), in the compute type and the layout above."""
    layers = unstack_layers(params)["layers"]
    laid_out = {
        "embed": params["embed"],
        "final_norm": params["final_norm"],
        "layers": tuple(_to_inference_layer(layer, config) for layer in layers),
    }
    if not config.tie_embeddings:
        laid_out["head"] = params["head"]
    return jax.tree.map(lambda leaf: leaf.astype(config.dtype), laid_out)


def _to_inference_layer(layer: Params, config: ModelConfig) -> Params:
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
    x = _embedded(params, config, one_hot(ids_BT.reshape(B * T), 1))
    rope = _rope(config, jnp.maximum(positions_BT, 0).reshape(B * T))
    attend = functools.partial(_attend_prompts, real_BT=positions_BT >= 0)
    kept = []
    for layer in params["layers"]:
        x, seen = _layer(config, layer, x, rope, attend)
        kept.append(seen)
    last = jax.lax.slice_in_dim(x, T - 1, B * T, stride=T, axis=token_axis())
    keys, values = (tuple(arrays) for arrays in zip(*kept, strict=True))
    cache = KVCache(keys, values, lengths_B.astype(jnp.int32), jnp.zeros((), jnp.int32))
    return _hidden(params, config, last), cache


def rope_table(config: ModelConfig, columns: int) -> Rope:
    """Rotary cosines and sines of all positions that a cache of so many columns has, for `decode_step`."""
    return _rope(config, jnp.arange(columns + 1))


def decode_step(
    params: Params, config: ModelConfig, inputs: Mixture, cache: KVCache, rope_table: Rope
) -> tuple[jax.Array, KVCache]:
    """Feeds one input per row, Mixture [B, C]: (hidden_BD, the cache one column on).

    The cache is written in place where it is donated or carried by a loop. A row that is full loses its
    oldest token, which spoils that row and no other. `rope_table` is that of the cache's columns,
    made outside of the loop: inside, XLA would compute each cosine anew in every layer and head.
    """
    B = cache.lengths_B.shape[0]
    chex.assert_shape(inputs.ids, (B, None))
    chex.assert_equal(rope_table[0].shape[token_axis()], cache.columns + 1)  # the look-up below would clip
    x = _embedded(params, config, inputs)
    cos, sin = (jnp.take(part, cache.lengths_B, axis=token_axis(), mode="clip") for part in rope_table)
    rope = cos, sin
    valid_BS = kv.valid_columns(cache.lengths_B, cache.cursor, cache.columns)
    kept = []
    for layer, own_keys, own_values in zip(params["layers"], cache.keys, cache.values, strict=True):
        attend = functools.partial(
            _attend_cache, keys=own_keys, values=own_values, valid_BS=valid_BS, cursor=cache.cursor
        )
        x, seen = _layer(config, layer, x, rope, attend)
        kept.append(seen)
    keys, values = (tuple(arrays) for arrays in zip(*kept, strict=True))
    cache = kv.advanced(cache._replace(keys=keys, values=values))
    return _hidden(params, config, x), cache


def logits(params: Params, hidden_BD: jax.Array) -> jax.Array:
    """float32 [B, V]."""
    rows_VD = params["head"]["rows"] if "head" in params else params["embed"]["embedding"]
    return jnp.einsum("bd,vd->bv", hidden_BD, rows_VD, preferred_element_type=jnp.float32)


def table_rows(params: Params, table: str) -> jax.Array:
    """The rows [V, D] among which neighbours are sought: of the input "embedding", or of the "head"."""
    if table == "head" and "head" in params:
        return params["head"]["rows"]
    return params["embed"]["embedding"]


def _layer(
    config: ModelConfig, layer: Params, x: jax.Array, rope: Rope, attend: Attend
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Normalised attention and normalised MLP, each added to what came in; and what `attend` keeps."""
    group = config.num_heads // config.num_kv_heads
    attention, mlp = layer["attention"], layer["mlp"]
    qkv = _times(attention["qkv"]["kernel"], _norm(x, layer["input_norm"]["scale"], config))
    if "bias" in attention["qkv"]:
        qkv = qkv + jnp.expand_dims(attention["qkv"]["bias"], token_axis())
    q, k, v = jnp.split(qkv, [group, group + 1], axis=_feature_axis() - 1)
    if "q_norm" in attention:
        q = _norm(q, attention["q_norm"]["scale"], config)
        k = _norm(k, attention["k_norm"]["scale"], config)
    out, kept = attend(_rotated(q, rope), *(_only(x) for x in (_rotated(k, rope), v)))
    # As one matrix: with the three dimensions apart, XLA transposes the weight at every step.
    output = attention["o"]["kernel"].reshape(config.hidden_size, -1)
    x = x + _times(output, out)
    gate_up = _times(mlp["gate_up"]["kernel"], _norm(x, layer["post_attention_norm"]["scale"], config))
    gate, up = (_only(part) for part in jnp.split(gate_up, 2, axis=_feature_axis() - 1))
    return x + _times(mlp["down"]["kernel"], jax.nn.silu(gate) * up), kept


def _feature_axis() -> int:
    """Where a token's entries (or those of one of its heads) lie: the last axis that is not its tokens'."""
    return -2 if token_axis() == -1 else -1


def _only(x: jax.Array) -> jax.Array:
    """Without the axis of length 1 before the features."""
    return jnp.squeeze(x, _feature_axis() - 1)


def _times(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A weight [outputs.., inputs] times tokens of so many inputs: tokens of [outputs..]."""
    return jnp.einsum("...n,nm->...m" if token_axis() == -1 else "...n,mn->m...", kernel, x)


def _attend_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    keys: jax.Array,
    values: jax.Array,
    valid_BS: jax.Array,
    cursor: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One query per row over the row's cache, into which its own key and value are written first."""
    q_BKGH, k_BKH, v_BKH = (jnp.moveaxis(x, token_axis(), 0) for x in (q, k, v))
    keys_BKHS, values_BKSH = kv.write(keys, values, k_BKH, v_BKH, cursor)
    scores = _product(q_BKGH, keys_BKHS)
    weights = _softmax(scores, valid_BS[:, None, None], q_BKGH.shape[3]).astype(values.dtype)
    out_BKGH = _product(weights, values_BKSH).astype(values.dtype)
    joined = out_BKGH.reshape(len(out_BKGH), -1)
    return jnp.moveaxis(joined, 0, token_axis()), (keys_BKHS, values_BKSH)


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
    return jnp.stack([_added(sum_BKRN) for sum_BKRN in sums], axis=2)


def _added(sums_BKRN: jax.Array) -> jax.Array:
    """Σ_r. Few runs are added one by one, which XLA joins with what comes next; many by a call of its own."""
    R = sums_BKRN.shape[2]
    if R > SUMMED:
        return jnp.sum(sums_BKRN, axis=2)
    return functools.reduce(operator.add, (sums_BKRN[:, :, r] for r in range(R)))


def _attend_prompts(
    q: jax.Array, k: jax.Array, v: jax.Array, *, real_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Causal attention within each prompt, a block of queries at a time; keeps keys and values as a cache."""
    B, T = real_BT.shape

    def by_prompt(x: jax.Array) -> jax.Array:
        """[B, ..., T]"""
        x = jnp.moveaxis(x, token_axis(), -1)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], B, T), -2, 0)

    q_BKGHT, keys_BKHT = by_prompt(q), by_prompt(k)
    values_BKTH = jnp.swapaxes(by_prompt(v), 2, 3)
    outs = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        seen_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        mask = (seen_TS[None] & real_BT[:, None, :stop])[:, None, None]
        scores = jnp.einsum(
            "bkght,bkhs->bkgts",
            q_BKGHT[..., start:stop],
            keys_BKHT[..., :stop],
            preferred_element_type=jnp.float32,
        )
        weights = _softmax(scores, mask, q_BKGHT.shape[3]).astype(values_BKTH.dtype)
        outs.append(jnp.einsum("bkgts,bksh->kghbt", weights, values_BKTH[:, :, :stop]))
    joined = jnp.concatenate(outs, axis=-1).reshape(-1, B * T)
    return jnp.moveaxis(joined, -1, token_axis()), (keys_BKHT, values_BKTH)


def _softmax(scores: jax.Array, mask: jax.Array, head_dim: int) -> jax.Array:
    """float32 weights over the last axis; a finite stand-in for -inf, so that an empty mask gives no NaN."""
    return jax.nn.softmax(jnp.where(mask, scores * head_dim**-0.5, MASKED), axis=-1)


def _embedded(params: Params, config: ModelConfig, inputs: Mixture) -> jax.Array:
    """Mixtures [M, C] -> states of M tokens."""
    x_MD = embed(params["embed"]["embedding"], inputs).astype(config.dtype)
    return jnp.moveaxis(x_MD, 0, token_axis())


def _hidden(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    """Final states of M tokens -> [M, D], normalised."""
    return jnp.moveaxis(_norm(x, params["final_norm"]["scale"], config), token_axis(), 0)


def _rope(config: ModelConfig, positions_M: jax.Array) -> Rope:
    angles = positions_M.astype(jnp.float32)[:, None] * jnp.asarray(inverse_frequencies(config))[None]
    angles = jnp.moveaxis(angles, 0, token_axis())
    return cosines_and_sines(angles)


def _rotated(x: jax.Array, rope: Rope) -> jax.Array:
    """Entry i of every head [K, J, H] with entry i + H/2 ("rotate half", as layers.rotate)."""
    heads = (0, 1) if token_axis() == -1 else (1, 2)
    cos, sin = (jnp.expand_dims(part, heads) for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=_feature_axis())
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=_feature_axis()).astype(x.dtype)


def _norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """RMSNorm over features (width or head size), float32 inside."""
    wide = x.astype(jnp.float32)
    squares = jnp.mean(jnp.square(wide), axis=_feature_axis(), keepdims=True)
    others = [axis for axis in range(x.ndim) if axis != x.ndim + _feature_axis()]
    scale = jnp.expand_dims(scale.astype(jnp.float32), others)
    return (wide * jax.lax.rsqrt(squares + config.norm_eps) * scale).astype(config.dtype)
