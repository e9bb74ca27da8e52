"""The compiled half of the rollout: prefill, filling of slots, and the decode chunk.

A slot holds one sequence: its cache rows, the hidden state that its next token will be drawn from, its own
PRNG key and its own count of written tokens. A step draws from key and count alone, so that a sequence does
not depend on its neighbours, its slot or the length of a chunk. The scheduler (engine.py) decides who sits
where; nothing here knows prompts as text, rewards or the learner.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ngrpo_jax.algo import mixture as mix
from ngrpo_jax.algo import sampling
from ngrpo_jax.model import cache as kv
from ngrpo_jax.model import inference
from ngrpo_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Placement:
    """How slots are split over a mesh: rows over some axes, key/value heads over at most one."""

    mesh: jax.sharding.Mesh
    rows: tuple[str, ...]
    heads: str | None

    @classmethod
    def of(cls, sharding: NamedSharding, params: Any) -> Placement:
        """Rows as `sharding` splits its leading dimension, heads as the laid-out parameters are split."""
        rows = sharding.spec[0]
        of_weights = params["layers"][0]["attention"]["qkv"]["kernel"].sharding
        heads = of_weights.spec[0] if isinstance(of_weights, NamedSharding) and of_weights.spec else None
        assert isinstance(sharding.mesh, jax.sharding.Mesh)
        return cls(sharding.mesh, rows if isinstance(rows, tuple) else (rows,), heads)

    @property
    def shards(self) -> int:
        """Parts that the rows are split into."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.rows]))

    def constrain_slots(self, slots: Slots) -> Slots:
        """Left to itself, XLA may choose anew, and no donated buffer could be reused."""
        rows = self._sharding(P(self.rows))
        cache = self.constrain_cache(slots.cache, self.rows)
        others = [jax.lax.with_sharding_constraint(leaf, rows) for leaf in slots[1:]]
        return Slots(cache, *others)

    def constrain_cache(self, cache: kv.KVCache, rows: tuple[str, ...] | None) -> kv.KVCache:
        """Keys and values split over rows (None: whole) and heads."""
        split = self._sharding(P(rows, self.heads))
        keys, values = (
            tuple(jax.lax.with_sharding_constraint(x, split) for x in arrays)
            for arrays in (cache.keys, cache.values)
        )
        lengths_B = jax.lax.with_sharding_constraint(cache.lengths_B, self._sharding(P(rows)))
        return kv.KVCache(keys, values, lengths_B, cache.cursor)

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How tokens are drawn and when a response ends: all that is fixed at compile time.

    temperature 0 is greedy; its log-probabilities are those of temperature 1, for the greedy law itself has
    none to tell.
    """

    temperature: float
    top_p: float
    top_k: int
    mixing: mix.Mixing
    stop_ids: tuple[int, ...]


class Slots(NamedTuple):
    """B sequences under way.

    Attributes:
      cache: keys and values, each row with its own length.
      hidden_BD: final hidden state of each row's last input.
      keys_B2: uint32 key data of each sequence.
      written_B: int32, response tokens so far.
      limits_B: int32, response tokens after which the sequence ends.
      tail_BM: int32, the last tokens of the response, as far as `until_ids` looks back; -1 where none.
      thinking_B: bool, whether mixing may still happen.
      active_B: bool, whether the row's sequence is unfinished.
    """

    cache: kv.KVCache
    hidden_BD: jax.Array
    keys_B2: jax.Array
    written_B: jax.Array
    limits_B: jax.Array
    tail_BM: jax.Array
    thinking_B: jax.Array
    active_B: jax.Array


class Written(NamedTuple):
    """What the steps of a chunk wrote, [T, B, ...]; `valid_TB` marks tokens of unfinished rows.

    `failed_TB` marks the step at which a row's logits were not finite; that step writes nothing.
    """

    tokens_TB: jax.Array
    mixtures: mix.Mixture
    mixed_TB: jax.Array
    logprobs_TB: jax.Array
    stopped_TB: jax.Array
    failed_TB: jax.Array
    valid_TB: jax.Array


class Seats(NamedTuple):
    """New sequences: N for each shard of the slots, of which the first `count` are real.

    Attributes:
      count: int32 [shards].
      slot: int32 [shards · N], the slot within its shard.
      source: int32 [shards · N], the row of the prefill that the sequence starts from.
      keys: uint32 [shards · N, 2].
      limits: int32 [shards · N], response tokens at most.
    """

    count: Any
    slot: Any
    source: Any
    keys: Any
    limits: Any


@functools.partial(jax.jit, static_argnames=("config", "sampler", "count", "columns", "placement"))
def empty_slots(
    config: ModelConfig, sampler: Sampler, count: int, columns: int, placement: Placement | None = None
) -> Slots:
    """`count` slots in which nobody sits, with a cache of `columns`, made where they will live."""
    slots = Slots(
        cache=kv.init(config, count, columns),
        hidden_BD=jnp.zeros((count, config.hidden_size), config.dtype),
        keys_B2=jnp.zeros((count, 2), jnp.uint32),
        written_B=jnp.zeros(count, jnp.int32),
        limits_B=jnp.zeros(count, jnp.int32),
        tail_BM=jnp.full((count, mix.tail_length(sampler.mixing.until_ids)), -1, jnp.int32),
        thinking_B=jnp.zeros(count, bool),
        active_B=jnp.zeros(count, bool),
    )
    return slots if placement is None else placement.constrain_slots(slots)


@functools.partial(jax.jit, static_argnames=("config", "placement"))
def prefill(
    params: Any,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    config: ModelConfig,
    placement: Placement | None = None,
) -> tuple[jax.Array, kv.KVCache]:
    """Right-padded prompts -> (hidden state of each last token [B, D], cache of T columns).

    On a mesh the prompts are divided over the shards of the slots (which must divide B), and each shard then
    gets all of the result, since any of its slots may start from any prompt.
    """
    if placement is None:
        return inference.prefill(params, config, ids_BT, lengths_B)
    rows = NamedSharding(placement.mesh, P(placement.rows))
    ids_BT, lengths_B = jax.lax.with_sharding_constraint((ids_BT, lengths_B), rows)
    hidden_BD, cache = inference.prefill(params, config, ids_BT, lengths_B)
    hidden_BD = jax.lax.with_sharding_constraint(hidden_BD, NamedSharding(placement.mesh, P()))
    return hidden_BD, placement.constrain_cache(cache, None)


@functools.partial(jax.jit, static_argnames="placement", donate_argnames="slots")
def fill(
    slots: Slots,
    hidden_PD: jax.Array,
    prefix: kv.KVCache,
    seats: Seats,
    placement: Placement | None = None,
) -> Slots:
    """Seats new sequences, each at a row of a prefill whose columns are no more than the slots'.

    Many may start from one row: a prompt is computed once, whatever its number of samples. Only the rows of
    new sequences are touched; on a mesh each shard seats its own, without a word to the others.
    """
    if placement is None:
        return _fill_shard(slots, hidden_PD, prefix, seats)
    rows, whole = P(placement.rows), P()
    of_cache = kv.KVCache(rows, rows, rows, whole)  # type: ignore[arg-type]
    of_slots = Slots(of_cache, *(rows,) * (len(Slots._fields) - 1))  # type: ignore[arg-type]
    filled = jax.shard_map(
        _fill_shard,
        mesh=placement.mesh,
        in_specs=(of_slots, whole, whole, Seats(*(rows,) * len(Seats._fields))),
        out_specs=of_slots,
        axis_names=set(placement.rows),
        check_vma=False,
    )(slots, hidden_PD, prefix, seats)
    return placement.constrain_slots(filled)


def _fill_shard(slots: Slots, hidden_PD: jax.Array, prefix: kv.KVCache, seats: Seats) -> Slots:
    """`fill` for the slots of one shard."""
    size, cursor = slots.cache.columns, slots.cache.cursor

    def seat(i: jax.Array, slots: Slots) -> Slots:
        slot, source = seats.slot[i], seats.source[i]

        def layers(slots_L: tuple, prefix_L: tuple, axis: int) -> tuple[jax.Array, ...]:
            rows_L = [jax.lax.dynamic_slice_in_dim(new, source, 1) for new in prefix_L]
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(old, kv.seated(row, size, cursor, axis), slot, 0)
                for old, row in zip(slots_L, rows_L, strict=True)
            )

        cache = kv.KVCache(
            keys=layers(slots.cache.keys, prefix.keys, kv.KEY_COLUMNS),
            values=layers(slots.cache.values, prefix.values, kv.VALUE_COLUMNS),
            lengths_B=slots.cache.lengths_B.at[slot].set(prefix.lengths_B[source]),
            cursor=cursor,
        )
        return Slots(
            cache=cache,
            hidden_BD=slots.hidden_BD.at[slot].set(hidden_PD[source]),
            keys_B2=slots.keys_B2.at[slot].set(seats.keys[i]),
            written_B=slots.written_B.at[slot].set(0),
            limits_B=slots.limits_B.at[slot].set(seats.limits[i]),
            tail_BM=slots.tail_BM.at[slot].set(-1),
            thinking_B=slots.thinking_B.at[slot].set(True),
            active_B=slots.active_B.at[slot].set(True),
        )

    return jax.lax.fori_loop(0, seats.count[0], seat, slots)


_stretched = jax.jit(kv.stretched, static_argnums=(2, 3))


def stretch(slots: Slots, size: int) -> Slots:
    """The slots with a cache of `size` columns: every row's newest tokens, as many as find room.

    The given ones are no more: array by array, so that only one at a time exists in both sizes.
    """
    cache = slots.cache
    keys, values = list(cache.keys), list(cache.values)
    for arrays, axis in ((keys, kv.KEY_COLUMNS), (values, kv.VALUE_COLUMNS)):
        for index in range(len(arrays)):
            old = arrays[index]
            arrays[index] = _stretched(old, cache.cursor, size, axis)
            old.delete()
    cursor = jnp.full_like(cache.cursor, kv.stretched_cursor(cache.columns, size))
    return slots._replace(cache=kv.KVCache(tuple(keys), tuple(values), cache.lengths_B, cursor))


@functools.partial(
    jax.jit, static_argnames=("config", "sampler", "steps", "placement"), donate_argnames="slots"
)
def decode_chunk(
    params: Any,
    table_VC: jax.Array | None,
    slots: Slots,
    *,
    config: ModelConfig,
    sampler: Sampler,
    steps: int,
    placement: Placement | None = None,
) -> tuple[Slots, Written]:
    """Writes `steps` tokens in every slot; rows that end on the way write nothing valid after it.

    Args:
      params: as `inference.lay_out` makes them.
      table_VC: neighbour table, or None where the strategy needs none.
      slots: donated; its buffers become the result's.
    """

    turned = inference.turns(config, slots.cache.columns)

    def step(slots: Slots, _: None) -> tuple[Slots, Written]:
        logits_BV = inference.logits(params, slots.hidden_BD)
        token_B, mixture, mixed_B, logprob_B = draw(logits_BV, table_VC, slots, sampler)
        # The log-sum-exp is finite just where no logit is NaN or +inf and not all are -inf.
        failed_B = slots.active_B & ~jnp.isfinite(logprob_B)
        valid_B = slots.active_B & ~failed_B
        tail_BM = jnp.concatenate([slots.tail_BM, token_B[:, None]], axis=1)[:, 1:]
        written_B = slots.written_B + valid_B
        stopped_B = jnp.isin(token_B, jnp.asarray(sampler.stop_ids, jnp.int32)) & valid_B
        hidden_BD, cache = inference.decode_step(params, config, mixture, slots.cache, turned)
        written = Written(token_B, mixture, mixed_B, logprob_B, stopped_B, failed_B, valid_B)
        after = slots._replace(
            cache=cache,
            hidden_BD=hidden_BD,
            written_B=written_B,
            tail_BM=tail_BM,
            thinking_B=slots.thinking_B & ~mix.completed(sampler.mixing.until_ids, tail_BM),
            active_B=valid_B & ~stopped_B & (written_B < slots.limits_B),
        )
        return after, written

    slots, written = jax.lax.scan(step, slots, None, length=steps)
    return slots if placement is None else placement.constrain_slots(slots), written


def draw(
    logits_BV: jax.Array, table_VC: jax.Array | None, slots: Slots, sampler: Sampler
) -> tuple[jax.Array, mix.Mixture, jax.Array, jax.Array]:
    """One step (2)-(11): written tokens [B], next inputs [B, C], whether mixed [B], log-probabilities [B].

    Two uniform numbers a row, whether or not anything is mixed: the first draws the token, the second opens
    the gate. So rate 0 and no mixing at all draw the same tokens from the same key.
    """
    scaled_BV = sampling.scaled(logits_BV, sampler.temperature or 1.0)

    def uniforms(key_2, count):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), count), (2,))

    uniforms_B2 = jax.vmap(uniforms)(slots.keys_B2, slots.written_B)
    truncated_logits_BV = sampling.truncate(scaled_BV, top_p=sampler.top_p, top_k=sampler.top_k)
    if sampler.temperature == 0:
        token_B = sampling.greedy(scaled_BV)
    else:
        token_B = sampling.sample(truncated_logits_BV, uniforms_B2[:, 0])
    mixture = mix.one_hot(token_B, sampler.mixing.candidates)
    mixed_B = jnp.zeros(token_B.shape, bool)
    if sampler.mixing.mixes:
        open_B = slots.thinking_B & slots.active_B & (uniforms_B2[:, 1] < sampler.mixing.rate)
        context = mix.StepContext(
            scaled_BV,
            truncated_logits_BV,
            token_B,
            slots.keys_B2,
            slots.written_B,
            table_VC,
            sampler.temperature,
        )
        token_B, mixture, mixed_B = mix.next_input(sampler.mixing, context, open_B)
    chosen_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=1)[:, 0]
    return token_B, mixture, mixed_B, chosen_B - sampling.log_total(scaled_BV)
