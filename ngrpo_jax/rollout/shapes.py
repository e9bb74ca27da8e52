"""The largest programs of a rollout, compiled from shapes: no array is made and nothing is run.

Owns which results of a program are the arguments of another. Must not know which machine compiles, nor what
is asked of a program.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.model.cache import KVCache
from ngrpo_jax.rollout import decode
from ngrpo_jax.rollout import slots as slot_state
from ngrpo_jax.rollout.programs import Programs
from ngrpo_jax.rollout.request import RolloutRequest
from ngrpo_jax.rollout.slots import Insertions, Prefix


def largest_programs(
    params: Any, request: RolloutRequest, table_VC: Any | None = None
) -> dict[str, Callable[[], jax.stages.Compiled]]:
    """The largest programs of such a rollout by name, compiled when called, from shapes: nothing is run.

    Args: as of `programs.compile_ahead`; `params` and `table_VC` jax.ShapeDtypeStruct with a sharding.
    """
    programs = Programs.of(request, params)
    of_prefill = programs.of_prefill()
    lengths_B = jax.ShapeDtypeStruct((programs.prefill_rows,), jnp.int32)
    if not request.sampling.mixing.uses_table:
        table_VC = None

    @_once
    def prefill_begin() -> tuple[jax.stages.Compiled, Any]:
        ids_BT = jax.ShapeDtypeStruct((programs.prefill_rows, programs.prompt_lengths[-1]), jnp.int32)
        return _with_results(decode.prefill_begin.lower(params, ids_BT, lengths_B, **of_prefill))

    @_once
    def prefill_layer() -> tuple[jax.stages.Compiled, Any]:
        layer, prompts = params["layers"][0], prefill_begin()[1]
        return _with_results(decode.prefill_layer.lower(layer, prompts, **of_prefill))

    @_once
    def prefill_end() -> tuple[jax.stages.Compiled, Any]:
        prompts, _ = prefill_layer()[1]
        return _with_results(decode.prefill_end.lower(params, prompts, lengths_B, **of_prefill))

    @_once
    def empty() -> tuple[jax.stages.Compiled, Any]:
        return _with_results(slot_state.empty.lower(programs.cache_sizes[-1], **programs.of_empty()))

    def insert() -> jax.stages.Compiled:
        keys, values = ((one,) * request.config.num_layers for one in prefill_layer()[1][1])
        hidden_PD, *rest = prefill_end()[1]
        prefix = Prefix(hidden_PD, KVCache(keys, values, *rest))
        nothing = Insertions.none(programs.slots, programs.shards)
        return slot_state.insert.lower(empty()[1], prefix, nothing, sharding=programs.sharding).compile()

    def decode_chunk() -> jax.stages.Compiled:
        return decode.decode_chunk.lower(params, table_VC, empty()[1], **programs.of_decode()).compile()

    return {
        "decode_chunk": decode_chunk,
        "prefill_begin": lambda: prefill_begin()[0],
        "prefill_layer": lambda: prefill_layer()[0],
        "prefill_end": lambda: prefill_end()[0],
        "empty": lambda: empty()[0],
        "insert": insert,
    }


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make`, called once though several threads ask for its result."""
    lock, cached = threading.Lock(), functools.cache(make)

    def result() -> Any:
        with lock:
            return cached()

    return result


def _with_results(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Any]:
    """A program, and the shapes of its results, with the shardings that the compiler gave them."""
    compiled = lowered.compile()
    results = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    return compiled, results
