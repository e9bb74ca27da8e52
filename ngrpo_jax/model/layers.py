"""The parts of a decoder layer: rotary angles, and the Linen modules of attention, MLP and norms.

Rotation and normalisation are float32; products of matrices are in `config.dtype`.
Knows nothing of how layers are strung together (decoder.py) or stored (hf.py).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.products import dense_product, swiglu

# Deviation 1/sqrt(inputs): a fixed 0.02 suits widths near 2000 and leaves a small model's attention flat.
_KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

Rope = tuple[jax.Array, jax.Array]  # cosines and sines, each [B, T, H/2]
Initializer = nn.initializers.Initializer
See = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) -> attention, of packed rows


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Rotary frequencies in radians per position, float32 [H/2] (2104.09864, and Llama 3.1's scaling)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rope_angles(config: ModelConfig, positions_BT: jax.Array) -> Rope:
    """Cosine and sine of every position's angles, float32 [B, T, H/2] each."""
    frequencies = jnp.asarray(inverse_frequencies(config))
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return cosines_and_sines(angles)


def cosines_and_sines(angles: jax.Array) -> Rope:
    """Both, computed once. As plain operations, XLA would fuse them into all that uses them, and compute them
    anew in every layer and head; results of a loop, here of two rounds, it leaves as they are.
    """
    both = jax.lax.map(lambda sine: jax.lax.cond(sine, jnp.sin, jnp.cos, angles), jnp.array([False, True]))
    return both[0], both[1]


def rotate(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """Rotates entry i with entry i + H/2 of every head ("rotate half", as Hugging Face weights want it)."""
    cos, sin = (part[:, :, None, :] for part in rope)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _residual_init(config: ModelConfig) -> Initializer:
    """For matrices that write into the residual stream: 2 L of them add up to a variance near 1."""
    return nn.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "normal")


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (1910.07467), computed in float32."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention of the tokens given; `see` computes it and knows who sees whom (model/attention.py)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: Rope, see: See) -> jax.Array:
        config = self.config

        def project(name: str, heads: int) -> jax.Array:
            features = (heads, config.head_dim)
            dense = nn.DenseGeneral(
                features,
                use_bias=config.qkv_bias,
                dtype=config.dtype,
                kernel_init=_KERNEL_INIT,
                dot_general=dense_product,
                name=name,
            )
            return dense(x_BTD)

        q, k, v = (
            project("q", config.num_heads),
            project("k", config.num_kv_heads),
            project("v", config.num_kv_heads),
        )
        if config.qk_norm:
            q = RMSNorm(config.norm_eps, config.dtype, name="q_norm")(q)
            k = RMSNorm(config.norm_eps, config.dtype, name="k_norm")(k)
        return nn.DenseGeneral(
            config.hidden_size,
            axis=(-2, -1),
            use_bias=False,
            dtype=config.dtype,
            kernel_init=_residual_init(config),
            dot_general=dense_product,
            name="o",
        )(see(rotate(q, rope), rotate(k, rope), v))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU, 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config

        def dense(name: str, features: int, init: Initializer) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=False,
                dtype=config.dtype,
                kernel_init=init,
                dot_general=dense_product,
                name=name,
            )

        gate = dense("gate", config.intermediate_size, _KERNEL_INIT)(x_BTD)
        up = dense("up", config.intermediate_size, _KERNEL_INIT)(x_BTD)
        return dense("down", config.hidden_size, _residual_init(config))(swiglu(gate, up))


class Block(nn.Module):
    """One layer: normalised attention and normalised MLP, each added to what came in."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: Rope, see: See) -> jax.Array:
        eps, dtype = self.config.norm_eps, self.config.dtype
        normed = RMSNorm(eps, dtype, name="input_norm")(x_BTD)
        x_BTD = x_BTD + Attention(self.config, name="attention")(normed, rope, see)
        normed = RMSNorm(eps, dtype, name="post_attention_norm")(x_BTD)
        return x_BTD + MLP(self.config, name="mlp")(normed)
