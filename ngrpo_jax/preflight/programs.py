"""Compiles the programs of a run from shapes: no weight is read and no array made.

The programs and their requests come from the functions that the run itself calls (setup/), with
`jax.ShapeDtypeStruct` in the place of arrays. What the compiler refuses is so found before a run starts, and
with a compilation cache the run finds its programs compiled.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.learner import packing, update
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout.programs import compile_largest
from ngrpo_jax.rollout.request import NO_MIXING
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import make_learner, old_logprobs, row_layout
from ngrpo_jax.setup.policy import abstract_policy, evaluation_request, training_request
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo

Compiled = dict[str, jax.stages.Compiled]


def compile_update(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> Compiled:
    """The programs of an update by name; "score" and a dtype: log-probabilities under such parameters."""
    learner = make_learner(settings, config, devices)
    programs, state = learner.programs, mesh.shapes_on(learner.abstract, learner.shardings)
    rows, count = _rows_of_a_call(settings, devices)
    source, reference = old_logprobs(settings), settings.objective.kl_coef > 0
    microbatches = update.Microbatches(
        rows,
        count,
        None if source == "update" else rows.sampler_logprobs_RT,
        rows.sampler_logprobs_RT if reference else None,
    )
    # The learner's parameters are float32, the reference model's in the dtype that it is kept in.
    dtypes = ["float32"] * (source == "learner") + [config.dtype] * reference
    compiled = {}
    for dtype in dict.fromkeys(dtypes):
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.update(dtype=jnp.dtype(dtype)), state.params)
        scored = update.Microbatches(rows, count)
        compiled[f"score {dtype}"] = programs.logprobs.lower(params, scored).compile()
    zeros = programs.zeros.lower(state.params, microbatches).compile()
    sums = mesh.shapes_on(jax.eval_shape(programs.zeros, state.params, microbatches), zeros.output_shardings)
    return compiled | {
        "zeros": zeros,
        "accumulate": programs.accumulate.lower(sums, state.params, microbatches).compile(),
        "apply": programs.apply.lower(state, sums).compile(),
    }


def compile_rollout(
    settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh, tokenizer_info: TokenizerInfo
) -> Compiled:
    """The largest programs of the rollouts of training and of evaluation by name, on this host's devices."""
    policy = abstract_policy(config, tokenizer_info, devices, settings.rollout.layout)
    requests = {
        "training": training_request(policy, settings),
        "evaluation": evaluation_request(policy, settings),
    }
    return {
        f"{purpose} {name}": compiled
        for purpose, request in requests.items()
        for name, compiled in compile_largest(policy.params, request, policy.table_VC).items()
    }


def _rows_of_a_call(settings: Settings, devices: jax.sharding.Mesh) -> tuple[packing.Rows, Any]:
    """(rows, their number of microbatches) as shapes, of one call of the learner over the whole mesh."""
    layout = row_layout(settings, hosts=1)
    sharding = update.microbatches_sharding(mesh.rows_sharding(devices))
    mixing = settings.mixing.method(()) if settings.mixing.active else NO_MIXING
    mixtures = Trajectories.empty(1, 1, mixing.candidates, noisy=mixing.noisy).mixtures
    rows = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (update.MICROBATCHES_PER_CALL, *leaf.shape), leaf.dtype, sharding=sharding
        ),
        packing.empty_rows(layout.rows, layout.row_tokens, mixtures),
    )
    return rows, jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh.replicated(devices))
