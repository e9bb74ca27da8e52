"""Compiles the programs of a run from shapes alone: no weight is read and no array made.

Each function mirrors the calls that training makes, with abstract arguments, so that what the compiler
refuses is known before a run starts; with a compilation cache the run then finds them compiled.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.learner import packing, update
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout.programs import compile_largest
from ngrpo_jax.rollout.request import NO_MIXING
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import console, mesh
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import make_learner, old_logprobs, row_layout
from ngrpo_jax.setup.policy import abstract_policy, evaluation_request, training_request
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo


def compile_update(
    settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh, _: Any = None
) -> tuple[Any, str]:
    """Compiles log-probabilities, accumulation and the optimiser step; returns them by name, and a remark."""
    begun = time.monotonic()
    programs, _, abstract, shardings = make_learner(settings, config, devices)
    state = mesh.shapes_on(abstract, shardings)
    layout = row_layout(settings, hosts=1)
    sharded = update.microbatches_sharding(mesh.rows_sharding(devices))
    mixing = settings.mixing.method(()) if settings.mixing.active else NO_MIXING
    like = Trajectories.empty(1, 1, mixing.candidates, noisy=mixing.noisy).mixtures
    rows = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (update.MICROBATCHES_PER_CALL, *leaf.shape), leaf.dtype, sharding=sharded
        ),
        packing.empty_rows(layout.rows, layout.row_tokens, like),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh.replicated(devices))
    source = old_logprobs(settings)
    old = None if source == "update" else rows.sampler_logprobs_RT
    reference = rows.sampler_logprobs_RT if settings.objective.kl_coef > 0 else None
    microbatches = update.Microbatches(rows, count, old, reference)
    zeros = programs.zeros.lower(state.params, microbatches).compile()
    sums = mesh.shapes_on(jax.eval_shape(programs.zeros, state.params, microbatches), zeros.output_shardings)
    # The learner's parameters are float32, the reference model's in the dtype that it is kept in.
    of_learner = ["float32"] if source == "learner" else []
    dtypes = dict.fromkeys(of_learner if reference is None else [*of_learner, config.dtype])
    compiled = {
        **{
            f"score {dtype}": programs.logprobs.lower(
                _in(dtype, state.params), update.Microbatches(rows, count)
            ).compile()
            for dtype in dtypes
        },
        "zeros": zeros,
        "accumulate": programs.accumulate.lower(sums, state.params, microbatches).compile(),
        "apply": programs.apply.lower(state, sums).compile(),
    }
    analysis = compiled["accumulate"].memory_analysis()
    room = (
        ""
        if analysis is None
        else f"; a microbatch takes {console.format_bytes(analysis.temp_size_in_bytes)}"
    )
    return compiled, f"{len(compiled)} compiled in {console.format_seconds(time.monotonic() - begun)}{room}"


def _in(dtype: str, params: Any) -> Any:
    """Parameters (their shapes) of another dtype, which lie where these do."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), params)


def compile_rollout(
    settings: Settings,
    config: ModelConfig,
    devices: jax.sharding.Mesh,
    tokenizer_info: TokenizerInfo,
    _: Any = None,
) -> tuple[Any, str]:
    """Compiles the largest programs of the rollouts of training and of evaluation, on this host's devices."""
    begun = time.monotonic()
    policy = abstract_policy(config, tokenizer_info, devices, settings.rollout.layout)
    requests = training_request(policy, settings), evaluation_request(policy, settings)
    count = sum(len(compile_largest(policy.params, one, policy.table_VC)) for one in requests)
    return count, f"{count} compiled in {console.format_seconds(time.monotonic() - begun)}"
