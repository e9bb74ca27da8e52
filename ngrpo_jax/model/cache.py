"""Keys and values of the tokens seen so far: an explicit argument and result, never a hidden collection.

The columns of a cache form a ring. Every row writes its next token into the same column, the one at the
cursor, however many tokens the row holds; so a step is one slice written in place and never a scatter. A row
of n tokens holds them in the n columns before the cursor, wrapping round at the end.

One array per layer rather than one stacked array: slicing a layer out of a stacked cache and putting it back
would copy all of it for every token. Keys stand with their columns last, values with their columns before
the head's entries: the orders in which the two products of attention read them straight through.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.model.config import ModelConfig

KEY_COLUMNS, VALUE_COLUMNS = 3, 2  # the axis of the columns in keys and in values


class KVCache(NamedTuple):
    """Rotated keys, and values, of B rows with S columns each.

    Columns that hold no token of a row are finite, of no meaning, and never attended to.
    """

    keys: tuple[jax.Array, ...]  # one [B, K, H, S] per layer
    values: tuple[jax.Array, ...]  # one [B, K, S, H] per layer
    lengths_B: jax.Array  # int32: tokens held, which is also the position of the next token
    cursor: jax.Array  # int32 scalar: the column of every row's next token

    @property
    def columns(self) -> int:
        """S."""
        return self.keys[0].shape[KEY_COLUMNS]


def init(config: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache of `batch` rows with `length` columns, in the compute type."""
    heads, size, dtype = config.num_kv_heads, config.head_dim, config.dtype
    layers = range(config.num_layers)
    # Every array is its own buffer: a donated cache may not hold one buffer twice.
    keys = tuple(jnp.zeros((batch, heads, size, length), dtype) for _ in layers)
    values = tuple(jnp.zeros((batch, heads, length, size), dtype) for _ in layers)
    return KVCache(keys, values, jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32))


def write(
    keys_BKHS: jax.Array, values_BKSH: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array, cursor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's cache with a token of each row in the column at the cursor; in place where it is donated."""
    k_BKH1 = k_BKH[..., None].astype(keys_BKHS.dtype)
    v_BK1H = v_BKH[:, :, None].astype(values_BKSH.dtype)
    keys_BKHS = jax.lax.dynamic_update_slice_in_dim(keys_BKHS, k_BKH1, cursor, KEY_COLUMNS)
    return keys_BKHS, jax.lax.dynamic_update_slice_in_dim(values_BKSH, v_BK1H, cursor, VALUE_COLUMNS)


def valid_columns(lengths_B: jax.Array, cursor: jax.Array, columns: int) -> jax.Array:
    """bool [B, S]: the columns that hold a row's token once the one at the cursor is written, too."""
    age_S = (cursor - jnp.arange(columns, dtype=jnp.int32)) % columns
    return age_S[None, :] <= lengths_B[:, None]


def advanced(cache: KVCache) -> KVCache:
    """The cache after a step: every row one token longer, a full one having lost its oldest."""
    return cache._replace(
        lengths_B=jnp.minimum(cache.lengths_B + 1, cache.columns), cursor=(cache.cursor + 1) % cache.columns
    )


def aligned(row: jax.Array, columns: int, cursor: jax.Array, axis: int) -> jax.Array:
    """A row whose T columns end with its newest token -> one of S ≥ T columns that end before the cursor."""
    room = [(0, 0)] * row.ndim
    room[axis] = (columns - row.shape[axis], 0)
    return jnp.roll(jnp.pad(row, room), cursor, axis)


def resized(array: jax.Array, cursor: jax.Array, columns: int, axis: int) -> jax.Array:
    """Keys or values with another number of columns, for a cursor as `resized_cursor` tells.

    Of a smaller number, the newest columns are kept; of a larger one, the last ones repeat old tokens. Looked
    up column by column: a roll of the last axis would hold the array twice on the way.
    """
    before = array.shape[axis]
    oldest = cursor + max(before - columns, 0)
    places_S = (oldest + jnp.arange(columns, dtype=jnp.int32)) % before
    return jnp.take(array, places_S, axis=axis, mode="clip")


def resized_cursor(before: int, columns: int) -> int:
    """Where the next token goes once a cache of `before` columns has `columns`."""
    return before if columns > before else 0
