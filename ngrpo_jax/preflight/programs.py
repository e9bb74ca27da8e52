"""Compiles the programs of a run from shapes: no weight is read and no array made.

The programs and their requests come from the functions that the run itself calls (setup/), with
`jax.ShapeDtypeStruct` in the place of arrays. What the compiler refuses is so found before a run starts, and
with a compilation cache the run finds its programs compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.neighbors import refresh
from ngrpo_jax.learner import packing, update
from ngrpo_jax.model import decoder, lora
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.inference import layer_to_inference_layout
from ngrpo_jax.rollout.request import NO_MIXING
from ngrpo_jax.rollout.shapes import largest_programs
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import make_learner, old_logprobs, row_layout
from ngrpo_jax.setup.policy import abstract_policy, evaluation_request, training_request
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo

Programs = dict[str, Callable[[], jax.stages.Compiled]]  # by name; compiled when called


def update_programs(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> Programs:
    """The programs of an update; "score" and a dtype: log-probabilities under such parameters."""
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
    shapes = jax.eval_shape(programs.zeros, state.params, microbatches)
    whole = jax.tree.map(lambda _: mesh.replicated(devices), shapes.metrics)
    sums = mesh.shapes_on(shapes, update.Sums(learner.shardings.changing.params, whole))

    def score(dtype: str) -> jax.stages.Compiled:
        trained, base = lora.split(state.params)
        trained = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), trained)
        params = lora.joined(base, trained)
        return programs.logprobs.lower(params, update.Microbatches(rows, count)).compile()

    # What the learner trains is float32, the reference model in the dtype that it is kept in.
    of_reference = config.dtype if config.lora is None else "float32"
    dtypes = ["float32"] * (source == "learner") + [of_reference] * reference
    return {
        "accumulate": lambda: programs.accumulate.lower(sums, state.params, microbatches).compile(),
        **{f"score {dtype}": functools.partial(score, dtype) for dtype in dict.fromkeys(dtypes)},
        "zeros": lambda: programs.zeros.lower(state.params, microbatches).compile(),
        "apply": lambda: programs.apply.lower(state.changing, sums).compile(),
    }


def rollout_programs(
    settings: Settings,
    config: ModelConfig,
    devices: jax.sharding.Mesh,
    tokenizer_info: TokenizerInfo,
    host: jax.sharding.Mesh | None = None,
) -> Programs:
    """The largest programs of the rollouts of training and of evaluation, on this host's devices.

    With that of the copy of their parameters, which takes the learner's on the whole mesh.

    Args:
      host: what is compiled for in the place of this host's devices.
    """
    layout = settings.rollout.layout
    shapes = decoder.parameter_shapes(config)
    stacked = mesh.shapes_on(shapes, mesh.param_shardings(devices, shapes))["layers"]
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh.replicated(devices))
    requests = {
        "training": (training_request, settings.rollout.quantize),
        "evaluation": (evaluation_request, None),
    }

    @functools.cache
    def copy_layer(quantize: str | None) -> jax.stages.Compiled:
        return layer_to_inference_layout.lower((stacked, number), config, quantize).compile()

    programs: Programs = {}
    for purpose, (request_of, quantize) in requests.items():
        policy = abstract_policy(config, tokenizer_info, host or devices, layout, quantize)
        policy = dataclasses.replace(policy, hosts=mesh.hosts(devices))
        largest = largest_programs(policy.params, request_of(policy, settings), policy.table_VC)
        programs[f"{purpose} copy_layer"] = functools.partial(copy_layer, quantize)
        programs |= {f"{purpose} {name}": compile_one for name, compile_one in largest.items()}
    return programs


def table_programs(
    settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh, tokenizer_info: TokenizerInfo
) -> Programs:
    """The neighbour table: built whole or brought up to date, in one program; none where no table is used."""
    mixing = tokenizer_info.mixing
    if not (settings.mixing.active and mixing.uses_table):
        return {}
    table = refresh.TableConfig(mixing.k, mixing.metric, devices)
    shapes = decoder.parameter_shapes(config)
    params = mesh.shapes_on(shapes, mesh.param_shardings(devices, shapes))
    rows_VD = decoder.table_rows(params, config, mixing.table)

    def compile_refresh() -> jax.stages.Compiled:
        state = jax.eval_shape(lambda: refresh.empty_state(config.vocab_size, table))
        state = mesh.shapes_on(state, jax.tree.map(lambda _: mesh.replicated(devices), state))
        work = jax.jit(functools.partial(refresh.refresh, config=table))
        return work.lower(state, rows_VD, tokenizer_info.eligible).compile()

    return {"table": compile_refresh}


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
