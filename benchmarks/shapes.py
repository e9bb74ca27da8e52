"""Model shapes by name, and random parameters in the rollout's layout made where they will live.

Speed does not depend on the values, so a benchmark needs no checkpoint. Parameters come leaf by leaf in their
final type: neither a float32 copy nor the host's memory ever holds the model.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig

SHAPES = {
    "small": ModelConfig("qwen2", 4096, 256, 1024, 4, 4, 2, 64, tie_embeddings=True),
    "smollm2": ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tie_embeddings=True),
    # DeepSeek-R1-Distill-Qwen, as their config.json files say.
    "r1-1.5b": ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, dtype="bfloat16"),
    "r1-7b": ModelConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, dtype="bfloat16"),
    # Llama-3.2-1B and Qwen3-1.7B-Base, as theirs say.
    "llama-1b": ModelConfig(
        "llama", 128256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True, dtype="bfloat16"
    ),
    "qwen3-1.7b": ModelConfig(
        "qwen3", 151936, 2048, 6144, 28, 16, 8, 128, tie_embeddings=True, dtype="bfloat16"
    ),
}
# model.path of the paper's configs -> its shape.
OF_PATH = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "r1-1.5b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "r1-7b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-1b",
    "Qwen/Qwen3-1.7B-Base": "qwen3-1.7b",
}


def random_params(
    config: ModelConfig, seed: int = 0, *, stacked: bool = False, dtype: str | None = None
) -> Any:
    """Matrices normal with deviation 1/sqrt(inputs), norms 1, biases 0, in `dtype` (by default the model's).

    The rollout's layout (model/inference.py); or the learner's, `stacked`.
    """

    def made(key: jax.Array) -> Any:
        params = decoder.init(key, config)
        return params if stacked else inference.to_inference_layout(params, config)

    shapes = jax.eval_shape(made, jax.random.key(seed))
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def leaf(path: tuple[Any, ...], shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _draw(key, shape, dtype or config.dtype, _deviation(name, config))

    return jax.tree.unflatten(tree, [leaf(p, x.shape, k) for (p, x), k in zip(leaves, keys, strict=True)])


def weights_read(config: ModelConfig) -> int:
    """Parameters that one decode step reads whole: all but an untied embedding, of which it reads rows."""
    count = decoder.parameter_count(config)
    return count if config.tie_embeddings else count - config.vocab_size * config.hidden_size


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that stand in matrix products, the head among them: 2 operations each for every token."""
    D, H, F = config.hidden_size, config.head_dim, config.intermediate_size
    layer = 2 * D * (config.num_heads + config.num_kv_heads) * H + 3 * D * F
    return config.num_layers * layer + D * config.vocab_size


def attention_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of scores and their sums, for the mean token of a causal sequence of `tokens`."""
    return 2 * config.num_layers * config.num_heads * config.head_dim * tokens


def cache_bytes(config: ModelConfig) -> int:
    """Keys and values of one token in all layers."""
    size = jnp.dtype(config.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * size


def _deviation(name: str, config: ModelConfig) -> float:
    """Of a leaf's entries around their mean; 0 for norms and biases."""
    if name.endswith(("scale", "bias")):
        return 0.0
    if "attention/o" in name:
        return (config.num_heads * config.head_dim) ** -0.5
    return (config.intermediate_size if "mlp/down" in name else config.hidden_size) ** -0.5


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "deviation"))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str, deviation: float) -> jax.Array:
    if deviation == 0.0:  # norms are 1; the biases of a fresh model are 0, but a 1 costs the same
        return jnp.ones(shape, dtype)
    return deviation * jax.random.normal(key, shape, dtype)
