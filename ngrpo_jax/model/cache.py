"""Keys and values of the tokens seen so far: an explicit argument and result, never a hidden collection.

One array per layer rather than one stacked array: a step then writes each in place, while slicing a layer out
of a stacked cache and putting it back would copy all of it for every token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.model.config import ModelConfig


class KVCache(NamedTuple):
    """Rotated keys, and values, of B rows with S slots each.

    Slots at and beyond a row's length hold nothing of meaning and are never attended to.
    """

    keys: tuple[jax.Array, ...]  # one [B, S, K, H] per layer
    values: tuple[jax.Array, ...]
    lengths_B: jax.Array  # int32: slots filled, which is also the position of the next token


def init(config: ModelConfig, batch: int, length: int, dtype: str | None = None) -> KVCache:
    """An empty cache of `batch` rows with `length` slots, in `dtype` (by default the compute type)."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)

    # Every array is its own buffer: a donated cache may not hold one buffer twice.
    def empty() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype or config.dtype) for _ in range(config.num_layers))

    return KVCache(empty(), empty(), jnp.zeros((batch,), jnp.int32))


def write_token(slots_BSKH: jax.Array, new_B1KH: jax.Array, index_B: jax.Array) -> jax.Array:
    """`slots_BSKH` with each row's entry at the row's own index; an index beyond the end means the last slot.

    A scatter: XLA performs it in place where the buffer is donated or carried by a loop.
    """
    rows_B = jnp.arange(slots_BSKH.shape[0])
    index_B = jnp.clip(index_B, 0, slots_BSKH.shape[1] - 1)
    new_BKH = new_B1KH[:, 0].astype(slots_BSKH.dtype)
    return slots_BSKH.at[rows_B, index_B].set(new_BKH, unique_indices=True, indices_are_sorted=True)
