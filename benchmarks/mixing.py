"""What mixing costs: decode chunks with and without mixing in turn, and the time of the neighbour table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import chunks, measure
from ngrpo_jax.algo.mixture import STRATEGIES, Mixing, Mixture, Proposal, StepContext, Strategy
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.algo.sampling import greedy
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
    """Adds a table: decoding at two mixing rates and by a recomputed similarity, against no mixing.

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
    STRATEGIES["recomputed"] = Strategy(_recomputed, frozenset({"k"}), uses_table=True)
    mixing, unit_VD = Mixing("recomputed", rate=0.1, k=K), jax.jit(unit_rows)(embedding_VD)
    sides[_RECOMPUTED] = chunks.decoding(params, config, mixing=mixing, table_VC=unit_VD, **common)
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


def unit_rows(embedding_VD: jax.Array) -> jax.Array:
    """Rows of length 1 in the embedding's type."""
    norms_V1 = jnp.linalg.norm(embedding_VD.astype(jnp.float32), axis=1, keepdims=True)
    return (embedding_VD / jnp.maximum(norms_V1, 1e-12)).astype(embedding_VD.dtype)


def recomputed_mixture(logits_BV: jax.Array, unit_VD: jax.Array, k: int) -> Mixture:
    """`neighbor_mixture` without a table: the anchor's cosine with the whole vocabulary at every step.

    What the authors' release does, at its cheapest: the rows have been normalised before.
    """
    anchor_B = greedy(logits_BV)
    cosines_BV = unit_VD[anchor_B] @ unit_VD.T
    every_BV = jax.lax.broadcasted_iota(jnp.int32, cosines_BV.shape, 1)
    found = [anchor_B]
    for _ in range(k - 1):  # the k best by as many passes: XLA's top_k sorts, on CPU at four times the step
        cosines_BV = jnp.where(every_BV == found[-1][:, None], -jnp.inf, cosines_BV)
        found.append(greedy(cosines_BV))
    ids_BC = jnp.stack(found, axis=1)
    logits_BC = jnp.take_along_axis(logits_BV, ids_BC, axis=1).astype(jnp.float32)
    return Mixture(ids_BC, jax.nn.softmax(logits_BC, axis=1))


def _recomputed(mixing: Mixing, step: StepContext) -> Proposal:
    """The neighbour strategy, with `unit_rows` in the place of the table."""
    mixture = recomputed_mixture(step.logits_BV, step.table_VC, mixing.k)
    return Proposal(mixture.ids[:, 0], mixture.ids[:, 0], mixture)
