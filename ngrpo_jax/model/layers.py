"""The parts of a decoder layer: rotary angles, and the Linen modules of attention, MLP and norms.

Rotation and normalisation are float32; matrix products are in `config.dtype`. Must not know how layers follow
one another (decoder.py), how attention is computed (attention.py), or how weights are stored (hf.py).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.shards import ALONE, Axis
from ngrpo_jax.model import lora
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.products import Adapter, dense_product, low_rank_products, swiglu

# Standard deviation 1/sqrt(inputs): with a fixed 0.02, which suits widths near 2000, the attention of a small
# model is almost uniform.
_KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

Rope = tuple[jax.Array, jax.Array]  # cosines and sines, each [B, T, H/2]
Rotate = Callable[[jax.Array, Rope], jax.Array]
Initializer = nn.initializers.Initializer
# (q [B, T, N, H], k [B, T, K, H], v [B, T, K, H]) -> [B, T, N, H], for the positions and segments of the rows
AttendInRows = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Rotary frequencies in radians a position, float32 [H/2] (arXiv 2104.09864, and Llama 3.1's scaling)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is not None:
        periods = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        unscaled = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        unscaled = np.clip(unscaled, 0.0, 1.0)
        frequencies = unscaled * frequencies + (1 - unscaled) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rope_angles(config: ModelConfig, positions_BT: jax.Array) -> Rope:
    """Cosine and sine of every position's angles, float32 [B, T, H/2] each."""
    frequencies = jnp.asarray(inverse_frequencies(config))
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return cosines_and_sines(angles)


def cosines_and_sines(angles: jax.Array) -> Rope:
    """Cosines and sines of angles, computed once.

    XLA would fuse plain cosines and sines into every operation that uses them, and so compute them anew in
    every layer and head. It does not recompute what a loop returns, here one of two iterations.
    """
    both = jax.lax.map(lambda sine: jax.lax.cond(sine, jnp.sin, jnp.cos, angles), jnp.array([False, True]))
    return both[0], both[1]


def rotate(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """Rotates entry i with entry i + H/2 of every head ("rotate half", the order of Hugging Face weights)."""
    cos, sin = (part[:, :, None, :] for part in rope)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def rotate_by_product(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """`rotate`, bit for bit, with the halves exchanged by a product with a signed permutation.

    For TPUs: slices of half a head leave half of the lanes of a vector idle and have to be copied together.
    """
    H = x_BTNH.shape[-1]
    exchange_HH = np.zeros((H, H), np.float32)
    exchange_HH[np.arange(H), (np.arange(H) + H // 2) % H] = np.where(np.arange(H) < H // 2, 1, -1)
    cos, sin = (jnp.concatenate([part, part], axis=-1)[:, :, None, :] for part in rope)
    # In bfloat16 exact as it is: one term of each sum is not 0. In float32 by the highest precision alone.
    exchanged = jnp.dot(
        x_BTNH,
        jnp.asarray(exchange_HH, x_BTNH.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return (x_BTNH.astype(jnp.float32) * cos + exchanged * sin).astype(x_BTNH.dtype)


def _residual_init(config: ModelConfig) -> Initializer:
    """For matrices whose products are added to the residual stream: 2 L of them sum to a variance near 1."""
    return nn.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "normal")


class Dense(nn.Module):
    """A product with a weight, [inputs.., outputs..], and what its adapter adds.

    Attributes:
      features: the outputs' dimensions.
      contracted: how many of the last axes of x are inputs.
    """

    config: ModelConfig
    features: tuple[int, ...]
    contracted: int = 1
    use_bias: bool = False
    kernel_init: Initializer = _KERNEL_INIT

    @nn.compact
    def __call__(self, x: jax.Array, low: jax.Array | None) -> jax.Array:
        """`low`: x A of this matrix, one of `_low_rank`; None where it has no adapter."""
        dtype = self.config.dtype
        shape = (*x.shape[x.ndim - self.contracted :], *self.features)
        matrix = math.prod(shape[: self.contracted]), math.prod(self.features)
        kernel = self.param("kernel", lambda key: self.kernel_init(key, matrix).reshape(shape))
        adapter = None
        if low is not None:
            assert self.config.lora is not None
            adapter = Adapter(low, self.get_variable("params", lora.B).astype(dtype), self.config.lora.scale)
        out = dense_product(x.astype(dtype), kernel.astype(dtype), self.contracted, adapter)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features).astype(dtype)
            out = out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)
        return out


def _low_rank(module: nn.Module, x: jax.Array, *names: str, contracted: int = 1) -> dict[str, jax.Array]:
    """x A by name, of those matrices of a module that have an adapter."""
    params, dtype = module.variables.get("params", {}), module.config.dtype
    factors = {name: params[name][lora.A].astype(dtype) for name in names if lora.A in params.get(name, {})}
    if not factors:
        return {}
    low = low_rank_products(x.astype(dtype), list(factors.values()), contracted)
    return dict(zip(factors, low, strict=True))


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (arXiv 1910.07467), computed in float32."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention; `attend` rotates queries and keys, and decides which tokens attend to which."""

    config: ModelConfig
    tensor: Axis = ALONE.tensor

    @nn.compact
    def __call__(self, x_BTD: jax.Array, attend: AttendInRows) -> jax.Array:
        config = self.config
        low = _low_rank(self, x_BTD, "q", "k", "v")

        def project(name: str, heads: int) -> jax.Array:
            sizes = (heads, config.head_dim)
            return Dense(config, sizes, use_bias=config.qkv_bias, name=name)(x_BTD, low.get(name))

        q = project("q", config.num_heads)
        k, v = (project(name, config.num_kv_heads) for name in ("k", "v"))
        if config.qk_norm:
            q = RMSNorm(config.norm_eps, config.dtype, name="q_norm")(q)
            k = RMSNorm(config.norm_eps, config.dtype, name="k_norm")(k)
        attended_BTNH = attend(q, k, v)
        init = _residual_init(config)
        out = Dense(config, (config.hidden_size,), contracted=2, kernel_init=init, name="o")
        low = _low_rank(self, attended_BTNH, "o", contracted=2)
        return self.tensor.sum(out(attended_BTNH, low.get("o")))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU, arXiv 2002.05202)."""

    config: ModelConfig
    tensor: Axis = ALONE.tensor

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        sizes, low = (config.intermediate_size,), _low_rank(self, x_BTD, "gate", "up")
        gate, up = (Dense(config, sizes, name=name)(x_BTD, low.get(name)) for name in ("gate", "up"))
        down = Dense(config, (config.hidden_size,), kernel_init=_residual_init(config), name="down")
        product = swiglu(gate, up)
        return self.tensor.sum(down(product, _low_rank(self, product, "down").get("down")))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then the same with the MLP.

    On a device of a mesh `config` has the heads and the feed-forward width of this device, whose results are
    summed over the axis `tensor`.
    """

    config: ModelConfig
    tensor: Axis = ALONE.tensor

    @nn.compact
    def __call__(self, x_BTD: jax.Array, attend: AttendInRows) -> jax.Array:
        eps, dtype = self.config.norm_eps, self.config.dtype
        normed = RMSNorm(eps, dtype, name="input_norm")(x_BTD)
        x_BTD = x_BTD + Attention(self.config, self.tensor, name="attention")(normed, attend)
        normed = RMSNorm(eps, dtype, name="post_attention_norm")(x_BTD)
        return x_BTD + MLP(self.config, self.tensor, name="mlp")(normed)
