"""What mixing costs: chunks with it and without it in turn, and the neighbour table beside them."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks import chunks, measure
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.model.config import ModelConfig

K = 3
_RECOMPUTED = "rate 0.1, similarity recomputed at each step"
GOALS = {"rate 0.1": "≤ 1.01", "rate 1": "≤ 1.02"}


def report_mixing(
    report: measure.Report,
    params: Any,
    config: ModelConfig,
    *,
    slots: int,
    context: int,
    steps: int,
    pairs: int,
) -> None:
    """Adds the table: every way of mixing against none, chunk by chunk.

    Args:
      params: rollout layout.
      steps: decode steps of one chunk.
      pairs: chunks of each side.
    """
    embedding_VD = params["embed"]["embedding"]
    measure.seconds_of(lambda: neighbor_table(embedding_VD, K))  # compiles
    table_s = measure.seconds_of(lambda: neighbor_table(embedding_VD, K))
    table_VC = neighbor_table(embedding_VD, K)
    common: dict[str, Any] = dict(slots=slots, context=context, steps=steps)
    sides = {"off": chunks.decoding(params, config, **common)}
    for rate in (0.1, 1.0):
        mixing = Mixing(rate=rate, k=K)
        sides[f"rate {rate:g}"] = chunks.decoding(params, config, mixing=mixing, table_VC=table_VC, **common)
    unit_VD = jax.jit(chunks.unit_rows)(embedding_VD)
    with chunks.recomputing(K):
        sides[_RECOMPUTED] = chunks.decoding(
            params, config, mixing=Mixing(rate=0.1, k=K), table_VC=unit_VD, **common
        )
    timings = measure.alternate(sides, pairs)
    rows = []
    for name in sides:
        slower = None if name == "off" else timings.ratio(name, "off")
        rows.append((name, slots * steps / timings.each(name).median, slower, GOALS.get(name)))
    report.table(
        f"Mixing: {slots} slots, context {context}, k = {K}",
        ("decoding", "tokens/s", "time / off", "goal"),
        rows,
        f"Chunks of {steps} steps; {timings.note()}.",
        f"The neighbour table, {config.vocab_size} × {config.hidden_size}, took {table_s:.3g} s "
        "(compiled before), once a refresh.",
    )
