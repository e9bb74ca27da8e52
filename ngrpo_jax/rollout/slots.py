"""The slots of a rollout on the device: their state, new sequences inserted, the cache resized.

A slot holds one sequence: its rows of the cache, the hidden state that its next token is sampled from, its
own PRNG key and its own count of tokens. Must not know how a token is sampled, nor which sequence comes next
(scheduler.py).

Letters of this file: E last response tokens, as many as the end of mixing depends on; I insertions of all
shards.
"""

import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ngrpo_jax.model import cache as kv
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout.sharding import ONE_DEVICE, SlotSharding


class Slots(NamedTuple):
    """B slots.

    Attributes:
      cache: keys and values, each row with its own length.
      hidden_BD: final hidden state of each row's last input.
      keys_B2: uint32 key data of each sequence.
      generated_B: int32, response tokens so far.
      limits_B: int32, response tokens after which the sequence ends.
      tail_BE: int32, the last response tokens, newest last; -1 where there is none yet.
      thinking_B: bool, whether mixing may still happen.
      active_B: bool, whether the row's sequence is unfinished.
    """

    cache: kv.KVCache
    hidden_BD: jax.Array
    keys_B2: jax.Array
    generated_B: jax.Array
    limits_B: jax.Array
    tail_BE: jax.Array
    thinking_B: jax.Array
    active_B: jax.Array


class Prefix(NamedTuple):
    """Prefilled prompts: the hidden state of each last token [P, D], and a cache of P rows."""

    hidden_PD: jax.Array
    cache: kv.KVCache


class Insertions(NamedTuple):
    """New sequences for the slots: as many a shard as it has slots, of which the first `count` are real.

    Attributes:
      count: int32 [shards].
      slot_I: int32, the slot within its shard.
      row_I: int32, the row of the prefix that the sequence continues.
      keys_I2: uint32 key data.
      limits_I: int32, response tokens at most.
    """

    count: Any
    slot_I: Any
    row_I: Any
    keys_I2: Any
    limits_I: Any

    @classmethod
    def none(cls, slots: int, shards: int) -> Self:
        """No sequence, for `slots` slots in `shards` equal parts."""
        return cls(
            count=np.zeros(shards, np.int32),
            slot_I=np.zeros(slots, np.int32),
            row_I=np.zeros(slots, np.int32),
            keys_I2=np.zeros((slots, 2), np.uint32),
            limits_I=np.zeros(slots, np.int32),
        )


@functools.partial(jax.jit, static_argnames=("columns", "config", "count", "tail", "sharding"))
def empty(
    columns: int, *, config: ModelConfig, count: int, tail: int, sharding: SlotSharding = ONE_DEVICE
) -> Slots:
    """`count` slots without a sequence, over a cache of `columns`; made on the devices that will hold them.

    `tail`: E.
    """
    slots = Slots(
        cache=kv.init(config, count, columns),
        hidden_BD=jnp.zeros((count, config.hidden_size), config.dtype),
        keys_B2=jnp.zeros((count, 2), jnp.uint32),
        generated_B=jnp.zeros(count, jnp.int32),
        limits_B=jnp.zeros(count, jnp.int32),
        tail_BE=jnp.full((count, tail), -1, jnp.int32),
        thinking_B=jnp.zeros(count, bool),
        active_B=jnp.zeros(count, bool),
    )
    return constrained(slots, sharding)


def constrained(slots: Slots, sharding: SlotSharding) -> Slots:
    """The slots with their sharding stated: XLA might choose another, and then reuse no donated buffer."""
    others = sharding.constrain(slots[1:], sharding.rows)
    return Slots(sharding.constrain_cache(slots.cache, sharding.rows), *others)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="slots")
def insert(
    slots: Slots, prefix: Prefix, insertions: Insertions, sharding: SlotSharding = ONE_DEVICE
) -> Slots:
    """The slots with new sequences, each continuing a row of `prefix`, which has no more columns than they.

    Several sequences may continue one row: a prompt is prefilled once, whatever its number of samples. Only
    the rows of new sequences are written; on a mesh each shard writes its own, without communication.
    """
    if sharding.mesh is None:
        return _insert_in_shard(slots, prefix, insertions)
    rows, whole = P(sharding.rows), P()
    of_cache = kv.KVCache(rows, rows, rows, whole)  # type: ignore[arg-type]
    of_slots = Slots(of_cache, *(rows,) * (len(Slots._fields) - 1))  # type: ignore[arg-type]
    inserted = jax.shard_map(
        _insert_in_shard,
        mesh=sharding.mesh,
        in_specs=(of_slots, whole, Insertions(*(rows,) * len(Insertions._fields))),
        out_specs=of_slots,
        axis_names=set(sharding.rows),
        check_vma=False,
    )(slots, prefix, insertions)
    return constrained(inserted, sharding)


def _insert_in_shard(slots: Slots, prefix: Prefix, insertions: Insertions) -> Slots:
    size, cursor = slots.cache.columns, slots.cache.cursor

    def insert_one(i: jax.Array, slots: Slots) -> Slots:
        slot, row = insertions.slot_I[i], insertions.row_I[i]

        def layers(slots_L: tuple, prefix_L: tuple, axis: int) -> tuple[jax.Array, ...]:
            rows_L = [jax.lax.dynamic_slice_in_dim(new, row, 1) for new in prefix_L]
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(old, kv.aligned(new, size, cursor, axis), slot, 0)
                for old, new in zip(slots_L, rows_L, strict=True)
            )

        cache = kv.KVCache(
            keys=layers(slots.cache.keys, prefix.cache.keys, kv.KEY_COLUMNS),
            values=layers(slots.cache.values, prefix.cache.values, kv.VALUE_COLUMNS),
            lengths_B=slots.cache.lengths_B.at[slot].set(prefix.cache.lengths_B[row]),
            cursor=cursor,
        )
        return Slots(
            cache=cache,
            hidden_BD=slots.hidden_BD.at[slot].set(prefix.hidden_PD[row]),
            keys_B2=slots.keys_B2.at[slot].set(insertions.keys_I2[i]),
            generated_B=slots.generated_B.at[slot].set(0),
            limits_B=slots.limits_B.at[slot].set(insertions.limits_I[i]),
            tail_BE=slots.tail_BE.at[slot].set(-1),
            thinking_B=slots.thinking_B.at[slot].set(True),
            active_B=slots.active_B.at[slot].set(True),
        )

    return jax.lax.fori_loop(0, insertions.count[0], insert_one, slots)


@functools.partial(jax.jit, static_argnames="sharding")
def _rows(arrays: Any, rows_B: Any, sharding: SlotSharding) -> Any:
    """Rows of each array, those of each shard by their places within it."""

    def take(arrays: Any, rows_B: jax.Array) -> Any:
        return jax.tree.map(lambda array: jnp.take(array, rows_B, axis=0, mode="clip"), arrays)

    if sharding.mesh is None:
        return take(arrays, rows_B)
    split, axes = P(sharding.rows), set(sharding.rows)
    by_shard = jax.shard_map(
        take, mesh=sharding.mesh, in_specs=(split, split), out_specs=split, axis_names=axes, check_vma=False
    )
    return by_shard(arrays, rows_B)


def keep(slots: Slots, rows_B: np.ndarray, sharding: SlotSharding = ONE_DEVICE) -> Slots:
    """Fewer slots: of each shard those in `rows_B`, by their places within it.

    The buffers of the given cache are deleted array by array, as in `resize`.
    """

    def kept(old: jax.Array) -> jax.Array:
        new = _rows(old, rows_B, sharding)
        old.delete()
        return new

    cache = slots.cache
    keys, values = (tuple(map(kept, arrays)) for arrays in (cache.keys, cache.values))
    lengths_B, *others = _rows((cache.lengths_B, *slots[1:]), rows_B, sharding)
    return Slots(kv.KVCache(keys, values, lengths_B, cache.cursor), *others)


_resized = jax.jit(kv.resized, static_argnums=(2, 3))


def resize(slots: Slots, columns: int) -> Slots:
    """The slots with a cache of `columns` columns: every row's newest tokens, as many as find room.

    The buffers of the given cache are deleted array by array, so that only one array at a time exists in both
    sizes.
    """
    cache = slots.cache
    keys, values = list(cache.keys), list(cache.values)
    for arrays, axis in ((keys, kv.KEY_COLUMNS), (values, kv.VALUE_COLUMNS)):
        for index in range(len(arrays)):
            old = arrays[index]
            arrays[index] = _resized(old, cache.cursor, columns, axis)
            old.delete()
    cursor = jnp.full_like(cache.cursor, kv.resized_cursor(cache.columns, columns))
    return slots._replace(cache=kv.KVCache(tuple(keys), tuple(values), cache.lengths_B, cursor))
