"""The decoder of the rollout: prefill and one-token steps, from weights joined once a rollout.

The same model as decoder.py; nothing here is trained, and none of it is Flax. Owns the inference layout of
the parameters and the forward passes over it. Must not know slots, sampling or how a mixture came about.

The inference layout stores every weight as [outputs, inputs], with the three projections of attention and the
two of the MLP joined, so that a step reads each weight once and in order:

    embed/embedding [V, D]    head/rows [V, D] unless tied    final_norm/scale [D]    layers: a tuple of
        input_norm/scale [D]                  post_attention_norm/scale [D]
        attention/qkv/kernel [K, Q+2, H, D]   bias [K, Q+2, H] (Qwen2): of each key/value head, its query
                                              heads, its key, its value
        attention/{q,k}_norm/scale [H]        (Qwen3)
        attention/o/kernel [D, K, Q, H]       mlp/gate_up/kernel [2, F, D]      mlp/down/kernel [D, F]

Quantised, a layer's kernels are int8, each with a `kernel_scale` of its outputs' dimensions beside it, by
which the product is multiplied; all else is as it was.

Letters of this file: Q query heads of a key/value head; U tokens of a pass in one axis (the rows of a cache,
or rows times tokens of prompts).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.mixture import Mixture, embed, one_hot
from ngrpo_jax.model import cache as kv
from ngrpo_jax.model import lora
from ngrpo_jax.model.cache import KVCache
from ngrpo_jax.model.cached_attention import (
    CacheAttention,
    KeysValues,
    attend_to_cache,
    attend_to_prompts,
    attend_to_valid,
)
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import head
from ngrpo_jax.model.layers import cosines_and_sines, inverse_frequencies

Params = dict[str, Any]
# (q [U, K, Q, H], k and v [U, K, H]) -> (attention [U, K, Q, H], the layer's keys and values)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, KeysValues]]
Rope = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [H/2] of U tokens


class Prompts(NamedTuple):
    """Prompts [B, T] between two layers.

    Attributes:
      states: [D] of U = B · T tokens.
      rope: of their positions.
      real_BT: bool, tokens that are no padding.
    """

    states: jax.Array
    rope: Rope
    real_BT: jax.Array


def is_inference_layout(params: Params) -> bool:
    """Whether `params` are in the inference layout."""
    layers = params["layers"]
    return isinstance(layers, tuple) and "qkv" in layers[0]["attention"]


def to_inference_layout(params: Params, config: ModelConfig, quantize: str | None = None) -> Params:
    """The learner's parameters (decoder.py's, stacked or not) in the inference layout and compute dtype.

    Adapters are merged into their matrices. Layers are converted by one program, one after the other: one of
    all layers would take minutes to compile for a TPU, and memory for all of them at once.

    `quantize`: "int8" rounds the matrices of the layers, by output channel; None keeps them.
    """
    given = params["layers"]
    if isinstance(given, tuple):
        layers = tuple(layer_to_inference_layout((layer,), config, quantize) for layer in given)
    else:
        numbers = np.arange(config.num_layers, dtype=np.int32)
        layers = tuple(layer_to_inference_layout((given, i), config, quantize) for i in numbers)
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return _cast(rest, config.dtype) | {"layers": layers}


@functools.partial(jax.jit, static_argnames=("config", "quantize"))
def layer_to_inference_layout(
    given: tuple[Params] | tuple[Params, jax.Array], config: ModelConfig, quantize: str | None
) -> Params:
    """A layer in the inference layout, of (its parameters,) or (stacked parameters, the layer's number)."""
    layer, *number = given
    if number:
        layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number[0], 0, False), layer)
    (merged,) = lora.merged({"layers": (layer,)}, config)["layers"]
    converted = jax.tree.map(lambda leaf: leaf.astype(config.dtype), _convert_layer(merged, config))
    return _quantized(converted) if quantize else converted


@functools.partial(jax.jit, static_argnums=1)
def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _quantized(layer: Params) -> Params:
    """A layer with its matrices in int8: w ≈ kernel · kernel_scale, a scale for each output."""
    parts = {"attention": ("qkv", "o"), "mlp": ("gate_up", "down")}
    quantized = {room: dict(layer[room]) for room in parts}
    for room, names in parts.items():
        for name in names:
            kernel = layer[room][name]["kernel"].astype(jnp.float32)
            inputs = (1, 2, 3) if name == "o" else (-1,)
            largest = jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True)
            scale = (
                jnp.maximum(largest, jnp.finfo(jnp.float32).tiny * 127) / 127
            )  # an output may be all zeros
            rounded = jnp.round(kernel / scale).astype(jnp.int8)
            scales = {"kernel": rounded, "kernel_scale": jnp.squeeze(scale, inputs)}
            quantized[room][name] = layer[room][name] | scales
    return layer | quantized


def _convert_layer(layer: Params, config: ModelConfig) -> Params:
    K, H, D = config.num_kv_heads, config.head_dim, config.hidden_size
    attention, mlp = layer["attention"], layer["mlp"]
    heads = {"q": config.num_heads // K, "k": 1, "v": 1}  # of each key/value head

    def joined(name: str, last: int) -> jax.Array:
        """[.., N, H] and twice [.., K, H] -> [K, Q+2, H, ..]"""
        parts = [attention[part][name].reshape(-1, K, count, H) for part, count in heads.items()]
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


@dataclasses.dataclass(frozen=True)
class InferenceModel:
    """The forward passes of a model on a platform; hashable, so that it can be a static argument of jax.jit.

    The states of U tokens are columns [D, U] on CPU and rows [U, D] elsewhere. Columns make a step's products
    W · x, which is what a CPU is fastest at: with rows a step takes a fifth longer there. On an H100 rows
    take 2 to 9 % less (docs/performance.md).

    Attributes:
      platform: of the devices, as jax.Device.platform has it.
      attention: of a decode step: "plain" over whole rows, "ring" by a kernel over the columns that rows hold
        (ring_attention.py), "auto" the kernel on TPU alone.
    """

    config: ModelConfig
    platform: str
    attention: str = "auto"

    @property
    def ring(self) -> bool:
        """Whether a kernel attends in decode steps, where it takes the heads and the cache."""
        return self.attention == "ring" or (self.attention == "auto" and self.platform == "tpu")

    @property
    def token_axis(self) -> int:
        """The axis of a state that the U tokens are in."""
        return -1 if self.platform == "cpu" else 0

    @property
    def _feature_axis(self) -> int:
        """The axis of a token's entries, or of one head's: the last that is not `token_axis`."""
        return -2 if self.platform == "cpu" else -1

    def prompts(self, params: Params, ids_BT: jax.Array, lengths_B: jax.Array) -> Prompts:
        """Right-padded prompts before the first layer.

        Padding has no influence; a row of length 0 gives a hidden state without meaning.
        """
        B, T = ids_BT.shape
        chex.assert_shape(lengths_B, (B,))
        # As in a ring whose cursor is at 0: each prompt ends with the last column, padding comes first.
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None] - (T - lengths_B)[:, None]
        ids_BT = jnp.take_along_axis(ids_BT, jnp.maximum(positions_BT, 0), axis=1)
        x = self._embed(params, one_hot(ids_BT.reshape(B * T), 1))
        return Prompts(x, self._rope(jnp.maximum(positions_BT, 0).reshape(B * T)), positions_BT >= 0)

    def prompt_layer(self, layer: Params, prompts: Prompts) -> tuple[Prompts, KeysValues]:
        """Prompts after one more layer, and that layer's part of a cache of T columns."""
        attend = functools.partial(attend_to_prompts, real_BT=prompts.real_BT)
        x, keys_values = self._layer(layer, prompts.states, prompts.rope, attend)
        return prompts._replace(states=x), keys_values

    def last_hidden(self, params: Params, prompts: Prompts) -> jax.Array:
        """hidden_BD after each prompt's last token, of prompts after the last layer."""
        T = prompts.real_BT.shape[1]
        last = jax.lax.slice_in_dim(prompts.states, T - 1, None, stride=T, axis=self.token_axis)
        return self._hidden(params, last)

    def rope_table(self, columns: int) -> Rope:
        """Rotary cosines and sines of all positions that a cache of so many columns can hold."""
        return self._rope(jnp.arange(columns + 1))

    def decode_step(
        self,
        params: Params,
        inputs: Mixture,
        cache: KVCache,
        rope_table: Rope,
        attention: CacheAttention | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Feeds one input per row, Mixture [B, C]: (hidden_BD, the cache one column on).

        The cache is written in place where it is donated or carried by a loop. A row that is full loses its
        oldest token, which spoils that row and no other.

        Args:
          rope_table: of the cache's columns, made outside of the loop over steps: inside, XLA would compute
            each cosine anew in every layer and head.
          attention: over each layer's cache, its columns at the cursor written; None: over all columns.
        """
        chex.assert_shape(inputs.ids, (*cache.lengths_B.shape, None))
        # `take` clips: a table of another size would give wrong angles silently.
        chex.assert_equal(rope_table[0].shape[self.token_axis], cache.columns + 1)
        x = self._embed(params, inputs)
        cos, sin = (jnp.take(part, cache.lengths_B, self.token_axis, mode="clip") for part in rope_table)
        if attention is None:
            valid_BS = kv.valid_columns(cache.lengths_B, cache.cursor, cache.columns)
            attention = functools.partial(attend_to_valid, valid_BS=valid_BS, platform=self.platform)
        attend = functools.partial(attend_to_cache, cursor=cache.cursor, attention=attention)
        caches = []
        for layer, *cached in zip(params["layers"], cache.keys, cache.values, strict=True):
            x, keys_values = self._layer(layer, x, (cos, sin), functools.partial(attend, cached=cached))
            caches.append(keys_values)
        keys, values = zip(*caches, strict=True)
        return self._hidden(params, x), kv.advanced(cache._replace(keys=keys, values=values))

    def logits(self, params: Params, hidden_BD: jax.Array) -> jax.Array:
        """float32 [B, V]."""
        head_VD = head(params, self.config)
        return jnp.einsum("bd,vd->bv", hidden_BD, head_VD, preferred_element_type=jnp.float32)

    def _layer(self, layer: Params, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, KeysValues]:
        """Normalised attention and normalised MLP, each added to its input; and the layer's cache."""
        group = self.config.num_heads // self.config.num_kv_heads
        attention, mlp = layer["attention"], layer["mlp"]
        qkv = self._times(attention["qkv"], self._norm(x, layer["input_norm"]["scale"]))
        if "bias" in attention["qkv"]:
            qkv = qkv + jnp.expand_dims(attention["qkv"]["bias"], self.token_axis)
        q, k, v = jnp.split(qkv, [group, group + 1], axis=self._feature_axis - 1)
        if "q_norm" in attention:
            q = self._norm(q, attention["q_norm"]["scale"])
            k = self._norm(k, attention["k_norm"]["scale"])
        parts = self._rotate(q, rope), self._squeeze(self._rotate(k, rope)), self._squeeze(v)
        out_UKQH, keys_values = attend(*(jnp.moveaxis(part, self.token_axis, 0) for part in parts))
        out = jnp.moveaxis(out_UKQH.reshape(len(out_UKQH), -1), 0, self.token_axis)
        # As one matrix: with the three dimensions apart, XLA transposes the weight at every step.
        output = attention["o"]["kernel"].reshape(self.config.hidden_size, -1)
        x = x + self._times(attention["o"] | {"kernel": output}, out)
        normed = self._norm(x, layer["post_attention_norm"]["scale"])
        gate_up = self._times(mlp["gate_up"], normed)
        gate, up = (self._squeeze(part) for part in jnp.split(gate_up, 2, axis=self._feature_axis - 1))
        return x + self._times(mlp["down"], jax.nn.silu(gate) * up), keys_values

    def _embed(self, params: Params, inputs: Mixture) -> jax.Array:
        """Mixtures [U, C] -> states of U tokens."""
        x_UD = embed(params["embed"]["embedding"], inputs).astype(self.config.dtype)
        return jnp.moveaxis(x_UD, 0, self.token_axis)

    def _hidden(self, params: Params, x: jax.Array) -> jax.Array:
        """Final states of U tokens -> [U, D], normalised."""
        return jnp.moveaxis(self._norm(x, params["final_norm"]["scale"]), self.token_axis, 0)

    def _rope(self, positions_U: jax.Array) -> Rope:
        frequencies = jnp.asarray(inverse_frequencies(self.config))
        angles = positions_U.astype(jnp.float32)[:, None] * frequencies[None]
        return cosines_and_sines(jnp.moveaxis(angles, 0, self.token_axis))

    def _squeeze(self, x: jax.Array) -> jax.Array:
        """Without the axis of length 1 before the features."""
        return jnp.squeeze(x, self._feature_axis - 1)

    def _times(self, weight: Params, x: jax.Array) -> jax.Array:
        """A weight [outputs.., inputs] times U tokens of so many inputs: U tokens of [outputs..]."""
        kernel = weight["kernel"].astype(x.dtype)
        product = jnp.einsum("...i,iu->...u" if self.platform == "cpu" else "...i,ui->u...", kernel, x)
        if "kernel_scale" not in weight:
            return product
        scale = jnp.expand_dims(weight["kernel_scale"], self.token_axis)
        return (product.astype(jnp.float32) * scale).astype(x.dtype)

    def _rotate(self, x: jax.Array, rope: Rope) -> jax.Array:
        """Entry i of every head with entry i + H/2 ("rotate half", as layers.rotate)."""
        heads = (0, 1) if self.platform == "cpu" else (1, 2)
        cos, sin = (jnp.expand_dims(part, heads) for part in rope)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=self._feature_axis)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(rotated, axis=self._feature_axis).astype(x.dtype)

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """RMSNorm over features (width or head size), float32 inside."""
        wide = x.astype(jnp.float32)
        squares = jnp.mean(jnp.square(wide), axis=self._feature_axis, keepdims=True)
        others = [axis for axis in range(x.ndim) if axis != x.ndim + self._feature_axis]
        scale = jnp.expand_dims(scale.astype(jnp.float32), others)
        return (wide * jax.lax.rsqrt(squares + self.config.norm_eps) * scale).astype(self.config.dtype)
