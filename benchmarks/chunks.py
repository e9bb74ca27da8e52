"""One decode chunk and one prefill, to be timed by themselves.

The only benchmark that knows how the engine decodes (rollout/decode.py); everything else calls `generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from ngrpo_jax.algo.mixture import Mixing, tail_length
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.inference import InferenceModel
from ngrpo_jax.rollout import decode
from ngrpo_jax.rollout import slots as slot_state
from ngrpo_jax.rollout.request import NO_MIXING, SamplingParams
from ngrpo_jax.rollout.slots import Slots


def decoding(
    params: Any,
    config: ModelConfig,
    *,
    slots: int,
    context: int,
    steps: int,
    mixing: Mixing = NO_MIXING,
    table_VC: jax.Array | None = None,
) -> Callable[[], float]:
    """A function that decodes `steps` steps in every slot, up to `context` tokens, and returns the seconds.

    All slots are busy and stay so: every chunk begins `steps` tokens before the end of the cache, whose
    contents do not matter for time.
    """
    sampling, model = SamplingParams(1.0, mixing=mixing), _model(config)
    state = _rewound(_busy(config, sampling, slots, context), steps)
    state, _ = jax.block_until_ready(_chunk(params, table_VC, state, model, sampling, steps))  # compiles

    def run() -> float:
        nonlocal state
        state = jax.block_until_ready(_rewound(state, steps))
        start = time.perf_counter()
        state, _ = jax.block_until_ready(_chunk(params, table_VC, state, model, sampling, steps))
        return time.perf_counter() - start

    return run


def decoding_memory(params: Any, config: ModelConfig, *, slots: int, context: int, steps: int) -> int:
    """Bytes that XLA sets aside for a chunk: arguments (parameters and slots), results and scratch."""
    sampling = SamplingParams(1.0)
    state = jax.eval_shape(lambda: _busy(config, sampling, slots, context))
    lowered = decode.decode_chunk.lower(
        params, None, state, model=_model(config), sampling=sampling, steps=steps
    )
    figures = lowered.compile().memory_analysis()
    held = figures.argument_size_in_bytes + figures.output_size_in_bytes - figures.alias_size_in_bytes
    return held + figures.temp_size_in_bytes


def prefilling(params: Any, config: ModelConfig, *, rows: int, tokens: int) -> Callable[[], float]:
    """A function that prefills `rows` prompts of `tokens` tokens and returns the seconds."""
    ids_BT = np.random.default_rng(0).integers(config.vocab_size, size=(rows, tokens)).astype(np.int32)
    lengths_B = np.full(rows, tokens, np.int32)

    def run() -> float:
        return measure.seconds_of(lambda: decode.prefill(params, ids_BT, lengths_B, model=_model(config)))

    run()
    return run


def _model(config: ModelConfig) -> InferenceModel:
    return InferenceModel(config, jax.devices()[0].platform)


def _chunk(params, table_VC, state, model, sampling, steps):
    """One chunk of the engine: (state after it, its output). `state` is donated."""
    return decode.decode_chunk(params, table_VC, state, model=model, sampling=sampling, steps=steps)


def _busy(config: ModelConfig, sampling: SamplingParams, slots: int, context: int) -> Slots:
    """Slots that all hold a thinking sequence, over an empty cache of `context` tokens each."""
    state = slot_state.empty(context, config=config, count=slots, tail=tail_length(sampling.mixing.until_ids))
    return state._replace(
        keys_B2=jax.random.key_data(jax.random.split(jax.random.key(1), slots)),
        thinking_B=jnp.ones_like(state.thinking_B),
        active_B=jnp.ones_like(state.active_B),
        limits_B=jnp.full_like(state.limits_B, 10**6),
    )


def _rewound(state: Slots, steps: int) -> Slots:
    """The same slots `steps` tokens before the end of their cache."""
    room = state.cache.columns - steps
    return state._replace(cache=state.cache._replace(lengths_B=jnp.full_like(state.cache.lengths_B, room)))
