"""Keys and values of the tokens so far: an explicit argument and result, never a hidden collection.

Owns where a token's keys and values are in the arrays. Must not know attention, nor which sequence a row
belongs to.

The columns of a cache form a ring. Every row writes its next token into the same column, the one at the
cursor, however many tokens the row holds; so a step writes one slice in place, where rows with cursors of
their own would need a scatter. A row of n tokens holds them in the n columns before the cursor, wrapping
round at the end. With 8 columns and the cursor at 3 (letters are tokens from the oldest on, `.` a column that
is not valid):

    column           0  1  2  3  4  5  6  7
    row of 5 tokens  c  d  e  .  .  .  a  b
    row of 2 tokens  .  a  b  .  .  .  .  .
    full row         f  g  h  a  b  c  d  e      its next token replaces its oldest one
                              ^ cursor

There is one array per layer rather than one stacked array: slicing a layer out of a stacked cache and putting
it back would copy all of it for every token. Keys have their columns last, values have them before the head's
entries: the orders in which the two products of attention read them straight through.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.model.config import ModelConfig

KEY_COLUMNS, VALUE_COLUMNS = 3, 2  # the axis of the columns in keys and in values


class KVCache(NamedTuple):
    """Rotated keys, and values, of B rows with S columns each.

    Columns that are not valid hold finite numbers without meaning, and are never attended to.

    Attributes:
      keys: one [B, K, H, S] per layer.
      values: one [B, K, S, H] per layer.
      lengths_B: int32, tokens that a row holds, which is also the position of its next token.
      cursor: int32 scalar, the column of every row's next token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths_B: jax.Array
    cursor: jax.Array

    @property
    def columns(self) -> int:
        """S."""
        return self.keys[0].shape[KEY_COLUMNS]


def init(config: ModelConfig, batch: int, columns: int) -> KVCache:
    """An empty cache of `batch` rows, in the compute dtype."""
    heads, size, dtype = config.num_kv_heads, config.head_dim, config.dtype
    layers = range(config.num_layers)
    # Every array is its own buffer: a donated cache may not hold one buffer twice.
    keys = tuple(jnp.zeros((batch, heads, size, columns), dtype) for _ in layers)
    values = tuple(jnp.zeros((batch, heads, columns, size), dtype) for _ in layers)
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
    """bool [B, S]: columns that hold a token of the row, once the column at the cursor is written as well."""
    age_S = (cursor - jnp.arange(columns, dtype=jnp.int32)) % columns
    return age_S[None, :] <= lengths_B[:, None]


def advanced(cache: KVCache) -> KVCache:
    """The cache after a step: every row one token longer, but for a full one, which has lost its oldest."""
    return cache._replace(
        lengths_B=jnp.minimum(cache.lengths_B + 1, cache.columns), cursor=(cache.cursor + 1) % cache.columns
    )


def aligned(array: jax.Array, columns: int, cursor: jax.Array, axis: int) -> jax.Array:
    """Keys or values of T columns, the newest last -> of S ≥ T columns, the newest before the cursor."""
    room = [(0, 0)] * array.ndim
    room[axis] = (columns - array.shape[axis], 0)
    return jnp.roll(jnp.pad(array, room), cursor, axis)


def resized(array: jax.Array, cursor: jax.Array, columns: int, axis: int) -> jax.Array:
    """Keys or values with another number of columns, for the cursor of `resized_cursor`.

    A smaller number keeps the newest columns; in a larger one the last columns repeat old tokens and are not
    valid. The columns are gathered one by one: a roll of the last axis would hold the array twice on the way.
    """
    before = array.shape[axis]
    oldest = cursor + max(before - columns, 0)
    sources_S = (oldest + jnp.arange(columns, dtype=jnp.int32)) % before
    return jnp.take(array, sources_S, axis=axis, mode="clip")


def resized_cursor(before: int, columns: int) -> int:
    """The column of the next token once a cache of `before` columns has `columns`."""
    return before if columns > before else 0
