"""The compiled steps of a rollout: prefill of prompts, and a chunk of decode steps over all slots.

A step samples each row's token from that row's key and count of tokens alone, so that a sequence depends
neither on its neighbours nor on its slot nor on the length of a chunk. Must not know which sequence is in
which slot (scheduler.py), prompts as text, rewards or the learner.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ngrpo_jax.algo import mixture as mix
from ngrpo_jax.algo.sampling import greedy, log_total, sample, scaled, truncate
from ngrpo_jax.model import ring_attention
from ngrpo_jax.model.cache import KVCache
from ngrpo_jax.model.cached_attention import CacheAttention, KeysValues
from ngrpo_jax.model.inference import InferenceModel, Prompts
from ngrpo_jax.rollout.request import SamplingParams
from ngrpo_jax.rollout.sharding import ONE_DEVICE, SlotSharding
from ngrpo_jax.rollout.slots import Prefix, Slots, constrained


class ChunkOutput(NamedTuple):
    """What T steps have generated in B slots.

    Attributes:
      tokens_TB: int32.
      mixtures: the input [T, B, C] that stands for each token.
      mixed_TB: bool, whether that input is a mixture rather than the token itself.
      logprobs_TB: float32, of the token before truncation, at the rollout temperature.
      stopped_TB: bool, whether the token is a stop id.
      nonfinite_TB: bool, whether the row's logits were not finite; such a step generates nothing.
      valid_TB: bool, whether the row's sequence was unfinished: every other field has a meaning there alone.
    """

    tokens_TB: jax.Array
    mixtures: mix.Mixture
    mixed_TB: jax.Array
    logprobs_TB: jax.Array
    stopped_TB: jax.Array
    nonfinite_TB: jax.Array
    valid_TB: jax.Array


def prefill(
    params: Any,
    ids_BT: Any,
    lengths_B: Any,
    *,
    model: InferenceModel,
    sharding: SlotSharding = ONE_DEVICE,
) -> Prefix:
    """Right-padded prompts -> hidden state of each last token, and a cache of T columns.

    On a mesh the prompts are divided over the shards of the slots (which must divide B), and every shard then
    holds all of the result, since any of its slots may continue any prompt. All layers share a program, which
    compiles in seconds where one program of all layers takes minutes.
    """
    prompts = prefill_begin(params, ids_BT, lengths_B, model=model, sharding=sharding)
    caches = []
    for layer in params["layers"]:
        prompts, keys_values = prefill_layer(layer, prompts, model=model, sharding=sharding)
        caches.append(keys_values)
    keys, values = zip(*caches, strict=True)
    hidden_BD, *rest = prefill_end(params, prompts, lengths_B, model=model, sharding=sharding)
    return Prefix(hidden_BD, KVCache(keys, values, *rest))


@functools.partial(jax.jit, static_argnames=("model", "sharding"))
def prefill_begin(
    params: Any, ids_BT: jax.Array, lengths_B: jax.Array, *, model: InferenceModel, sharding: SlotSharding
) -> Prompts:
    """The prompts before the first layer."""
    ids_BT, lengths_B = sharding.constrain((ids_BT, lengths_B), sharding.rows)
    return _divided(model.prompts(params, ids_BT, lengths_B), model, sharding)


@functools.partial(jax.jit, static_argnames=("model", "sharding"), donate_argnames="prompts")
def prefill_layer(
    layer: Any, prompts: Prompts, *, model: InferenceModel, sharding: SlotSharding
) -> tuple[Prompts, KeysValues]:
    """The prompts after one more layer, and that layer's keys and values."""
    prompts, keys_values = model.prompt_layer(layer, prompts)
    return _divided(prompts, model, sharding), sharding.constrain(keys_values, None, sharding.heads)


@functools.partial(jax.jit, static_argnames=("model", "sharding"))
def prefill_end(
    params: Any, prompts: Prompts, lengths_B: jax.Array, *, model: InferenceModel, sharding: SlotSharding
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states after the last layer, and what a cache has besides keys and values."""
    rest = lengths_B.astype(jnp.int32), jnp.zeros((), jnp.int32)
    return sharding.constrain((model.last_hidden(params, prompts), *rest))


def _divided(prompts: Prompts, model: InferenceModel, sharding: SlotSharding) -> Prompts:
    """The prompts over the shards of the slots."""
    axes = (sharding.rows,) if model.token_axis == 0 else (None, sharding.rows)
    states, rope = sharding.constrain((prompts.states, prompts.rope), *axes)
    return Prompts(states, rope, sharding.constrain(prompts.real_BT, sharding.rows))


@functools.partial(
    jax.jit, static_argnames=("model", "sampling", "steps", "sharding"), donate_argnames="slots"
)
def decode_chunk(
    params: Any,
    table_VC: jax.Array | None,
    slots: Slots,
    *,
    model: InferenceModel,
    sampling: SamplingParams,
    steps: int,
    sharding: SlotSharding = ONE_DEVICE,
) -> tuple[Slots, ChunkOutput]:
    """Generates `steps` tokens in every slot; a row that ends on the way generates nothing valid after it.

    Args:
      params: in the inference layout.
      table_VC: neighbour table, or None where the strategy needs none.
      slots: donated; its buffers become the result's.
    """
    rope_table = model.rope_table(slots.cache.columns)

    def step(slots: Slots, _: None) -> tuple[Slots, ChunkOutput]:
        logits_BV = model.logits(params, slots.hidden_BD)
        token_B, mixture, mixed_B, logprob_B = sample_step(
            logits_BV, table_VC, slots, sampling, params["embed"]["embedding"]
        )
        # The log-sum-exp is finite just where no logit is NaN or +inf and not all are -inf.
        nonfinite_B = slots.active_B & ~jnp.isfinite(logprob_B)
        valid_B = slots.active_B & ~nonfinite_B
        tail_BE = jnp.concatenate([slots.tail_BE, token_B[:, None]], axis=1)[:, 1:]
        generated_B = slots.generated_B + valid_B
        stopped_B = jnp.isin(token_B, jnp.asarray(sampling.stop_ids, jnp.int32)) & valid_B
        # Of a row without a sequence one block is read.
        lengths_B = jnp.where(slots.active_B, slots.cache.lengths_B, 0)
        cache = slots.cache._replace(lengths_B=lengths_B)
        attention = held_attention(model, cache, sharding)
        hidden_BD, cache = model.decode_step(params, mixture, cache, rope_table, attention)
        output = ChunkOutput(token_B, mixture, mixed_B, logprob_B, stopped_B, nonfinite_B, valid_B)
        after = slots._replace(
            cache=cache,
            hidden_BD=hidden_BD,
            generated_B=generated_B,
            tail_BE=tail_BE,
            thinking_B=slots.thinking_B & ~mix.completed(sampling.mixing.until_ids, tail_BE),
            active_B=valid_B & ~stopped_B & (generated_B < slots.limits_B),
        )
        return after, output

    slots, output = jax.lax.scan(step, slots, None, length=steps)
    return constrained(slots, sharding), output


def held_attention(model: InferenceModel, cache: KVCache, sharding: SlotSharding) -> CacheAttention | None:
    """Attention that reads the columns that rows hold alone; None where no kernel takes such a cache."""
    platform, columns = model.platform, cache.columns
    width = ring_attention.block_width(platform, model.config.head_dim, columns) if model.ring else None
    if width is None:
        return None
    rows, heads, whole = P(sharding.rows), P(sharding.rows, sharding.heads), P()
    visits = functools.partial(ring_attention.visits, columns=columns, width=width)
    visited = sharding.by_device(visits, (rows, whole), rows)(cache.lengths_B, cache.cursor)
    attend = functools.partial(ring_attention.attend, platform=platform)
    by_device = sharding.by_device(attend, (heads, heads, heads, rows, rows, whole), heads)
    return lambda q, keys, values: by_device(q, keys, values, visited, cache.lengths_B, cache.cursor)


def sample_step(
    logits_BV: jax.Array,
    table_VC: jax.Array | None,
    slots: Slots,
    sampling: SamplingParams,
    embedding_VD: jax.Array | None = None,
) -> tuple[jax.Array, mix.Mixture, jax.Array, jax.Array]:
    """One step (2)-(11): tokens [B], next inputs [B, C], whether mixed [B], log-probabilities [B].

    Two uniform numbers a row, whether or not anything is mixed: the first samples the token, the second
    decides whether the step is mixed. So rate 0 and no mixing at all sample the same tokens from the same
    key.
    """
    scaled_BV = scaled(logits_BV, sampling.temperature or 1.0)

    def uniforms(key_2, count):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), count), (2,))

    uniforms_B2 = jax.vmap(uniforms)(slots.keys_B2, slots.generated_B)
    truncated_logits_BV = truncate(scaled_BV, top_p=sampling.top_p, top_k=sampling.top_k)
    if sampling.temperature == 0:
        token_B = greedy(scaled_BV)
    else:
        token_B = sample(truncated_logits_BV, uniforms_B2[:, 0])
    mixture = mix.one_hot(token_B, sampling.mixing.candidates)
    mixed_B = jnp.zeros(token_B.shape, bool)
    if sampling.mixing.mixes:
        open_B = slots.thinking_B & slots.active_B & (uniforms_B2[:, 1] < sampling.mixing.rate)
        context = mix.StepContext(
            scaled_BV,
            truncated_logits_BV,
            token_B,
            slots.keys_B2,
            slots.generated_B,
            table_VC,
            sampling.temperature,
            embedding_VD,
        )
        token_B, mixture, mixed_B = mix.next_input(sampling.mixing, context, open_B)
    chosen_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=1)[:, 0]
    return token_B, mixture, mixed_B, chosen_B - log_total(scaled_BV)
