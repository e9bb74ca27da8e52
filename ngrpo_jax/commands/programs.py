"""Compiles the programs of a run from shapes alone: no weight is read and no array made.

Each function mirrors the calls that training makes, with abstract arguments, so that what the compiler
refuses is known before a run starts; with a compilation cache the run then finds them compiled.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.commands import composition, evaluation
from ngrpo_jax.commands.run import make_learner, placed_shapes
from ngrpo_jax.learner import packing
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import decode, engine
from ngrpo_jax.runtime import console, mesh
from ngrpo_jax.settings import Settings


def compile_update(
    settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh, _: Any = None
) -> tuple[Any, str]:
    """Compiles scoring, accumulation and the optimiser step; returns them by name, and a remark."""
    begun = time.monotonic()
    programs, _, abstract, shardings = make_learner(settings, config, devices)
    state = placed_shapes(abstract, shardings)
    by_rows = mesh.rows_sharding(devices)
    count = settings.train.rows_per_device * settings.mesh.data * settings.mesh.fsdp
    candidates = settings.mixing.k if settings.mixing.active else 1
    rows = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_rows),
        packing.empty_rows(count, settings.row_tokens, candidates),
    )
    scores = jax.ShapeDtypeStruct((count, settings.row_tokens), jnp.float32, sharding=by_rows)
    reference = scores if settings.objective.kl_coef > 0 else None
    compiled = {
        "score": programs.score.lower(state.params, rows).compile(),
        "zeros": programs.zeros.lower(state.params).compile(),
        "accumulate": programs.accumulate.lower(
            state.params, state.params, rows, scores, reference
        ).compile(),
        "apply": programs.apply.lower(state, state.params).compile(),
    }
    analysis = compiled["accumulate"].memory_analysis()
    room = (
        ""
        if analysis is None
        else f"; a microbatch takes {console.format_bytes(analysis.temp_size_in_bytes)}"
    )
    return compiled, f"{len(compiled)} compiled in {console.format_seconds(time.monotonic() - begun)}{room}"


def compile_rollout(
    settings: Settings,
    config: ModelConfig,
    devices: jax.sharding.Mesh,
    language: composition.Language,
    _: Any = None,
) -> tuple[Any, str]:
    """Compiles prefill and decoding, of training and of evaluation, on this host's devices."""
    begun = time.monotonic()
    local = mesh.local_mesh(devices)
    by_rows, whole = mesh.rows_sharding(local), mesh.replicated(local)
    shapes = jax.eval_shape(lambda p: engine.lay_out(p, config), composition.parameter_shapes(config))
    params = placed_shapes(shapes, mesh.param_shardings(local, shapes, layout="tensor"))
    table_VC = jax.ShapeDtypeStruct((config.vocab_size, settings.mixing.k), jnp.int32, sharding=whole)
    slots = -(-settings.rollout.slots // jax.process_count())
    slots = -(-slots // local.size) * local.size
    compiled = []
    for draws in (evaluation.training_draws(settings), evaluation.evaluation_draws(settings)):
        sampler = decode.Sampler(
            draws.temperature,
            draws.top_p,
            draws.top_k,
            language.mixing if draws.mixes else engine.NO_MIXING,
            language.stop_ids,
            draws.max_new_tokens,
        )
        length = settings.data.max_prompt_tokens + draws.max_new_tokens
        empty = jax.eval_shape(lambda s=sampler, n=length: decode.empty_slots(config, s, slots, n))
        state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_rows), empty
        )
        chunk = decode.decode_chunk.lower(
            params,
            table_VC if draws.mixes else None,
            state,
            config=config,
            sampler=sampler,
            steps=settings.rollout.chunk,
            sharding=by_rows,
        )
        batch, longest = max(1, slots // draws.samples), settings.data.max_prompt_tokens
        ids_BT = jax.ShapeDtypeStruct((batch, longest), jnp.int32)
        lengths_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
        compiled += [
            chunk.compile(),
            decode.prefill.lower(params, ids_BT, lengths_B, config=config).compile(),
        ]
    return compiled, f"{len(compiled)} compiled in {console.format_seconds(time.monotonic() - begun)}"
