"""A neighbour table that follows its matrix: what an update cannot have changed is not computed again.

Owns the bounds. For each row the state keeps its best candidates, a bound on the closeness of all others, and
how much the row's scores may have moved since both were established. While that is less than half of the
smallest gap that matters, the row's part of the table stands as it is. Otherwise its candidates are scored
again; if the last wanted one is still above the bound for the others, that is all, and if not the row is
searched anew. So the table is always the exact one. docs/method.md derives the bounds.

The state holds no copy of the matrix: `add_drift` is given the matrix before and after each change. A
fingerprint says which matrix a state is about; for any other matrix `refresh` builds everything anew. Which
rows may be whose neighbours is fixed as long as a state lives: all bounds are about eligible rows alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ngrpo_jax.algo.neighbors import exact, nearness
from ngrpo_jax.algo.neighbors.eligibility import Eligible
from ngrpo_jax.algo.neighbors.exact import AXIS, Nearest, SearchIndex
from ngrpo_jax.algo.neighbors.nearness import UNIT

# Where more rows than this share fail, building all of them anew is cheaper than searching each alone.
_FULL_BUILD = 0.25
_FINGERPRINT_ROWS = 4096  # rows that tell one state of a matrix from another


class RowBounds(NamedTuple):
    """What a state holds of each row: 4 (C + 3) bytes.

    ids_VC      candidates, nearest first; -1 where there are no more
    rest_bound_V   bounds the closeness of all other eligible rows, as it was before `drift_V`
    margin_V    the first k-1 candidates and their order stand while `drift_V` is below
    drift_V     how much any closeness of this row may have changed
    """

    ids_VC: jax.Array
    rest_bound_V: jax.Array
    margin_V: jax.Array
    drift_V: jax.Array


class TableState(NamedTuple):
    """A table and its bounds, and the fingerprint of the matrix that they are about: a hash, uint32 []."""

    bounds: RowBounds
    fingerprint: jax.Array


class RefreshStats(NamedTuple):
    """What a refresh did: rows whose candidates were scored again, rows searched anew, whether all were."""

    rescored: jax.Array
    searched: jax.Array
    full: jax.Array


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """How a table is built and refreshed: its k and metric, and the mesh over which the work is divided."""

    k: int
    metric: str = "cosine"
    mesh: Mesh | None = None
    spare: int = exact.SPARE
    tile: int = exact.TILE

    @property
    def neighbors(self) -> int:
        """Candidates that have to be the nearest, in order."""
        return max(1, self.k - 1)

    def candidates(self, size: int) -> int:
        """Candidates that a state holds of a row."""
        return min(self.neighbors + self.spare, size)

    def shapes(self, size: int) -> TableState:
        """The state of a matrix of `size` rows as jax.ShapeDtypeStruct."""
        return jax.eval_shape(lambda: _empty_state(size, self))

    def cost(self, stats: RefreshStats, size: int) -> float:
        """Scores that a refresh has computed, as a share of those that building all anew computes."""
        count = self.candidates(size)
        whole = size * (size / 2 if exact.uses_tiles(size, count, self.tile) else size)
        again = int(stats.rescored) * count
        return (again + (whole if stats.full else int(stats.searched) * size)) / whole


def empty_state(size: int, config: TableConfig) -> TableState:
    """The state of no matrix, from which `refresh` builds everything."""
    return jax.jit(lambda: _empty_state(size, config), out_shardings=_everywhere(config))()


def _empty_state(size: int, config: TableConfig) -> TableState:
    unknown_V = jnp.full(size, jnp.inf, jnp.float32)
    nobody_VC = jnp.full((size, config.candidates(size)), -1, jnp.int32)
    return TableState(RowBounds(nobody_VC, unknown_V, -unknown_V, unknown_V), jnp.uint32(0))


def table(state: TableState, config: TableConfig) -> jax.Array:
    """The neighbour table [V, k], exact after `refresh`."""
    return exact.as_table(state.bounds.ids_VC, config.k)


def add_drift(
    state: TableState, before_VD: jax.Array, after_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> TableState:
    """The same table with bounds that hold for `after_VD`, where it was about `before_VD`.

    Two passes over the matrices, in whatever sharding they have.
    """
    return _program(_add_drift, config)(state, before_VD, after_VD, eligible)


def _add_drift(
    state: TableState, before_VD: jax.Array, after_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> TableState:
    known = state.fingerprint == _fingerprint(before_VD)
    change_V = _change(
        before_VD.astype(jnp.float32), after_VD.astype(jnp.float32), eligible.valid_V, config.metric
    )
    drift_V = _above(jnp.where(known, state.bounds.drift_V, jnp.inf) + change_V)
    return TableState(state.bounds._replace(drift_V=drift_V), _fingerprint(after_VD))


def refresh(
    state: TableState, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> tuple[TableState, RefreshStats]:
    """The state with the exact table of `embedding_VD`, for which `add_drift` has prepared it."""
    return _program(_refresh, config)(state, embedding_VD, eligible)


@functools.cache
def _program(work: Callable, config: TableConfig) -> Callable:
    """`work` compiled. States always lie the same way, or every program would be compiled for each way."""
    return jax.jit(functools.partial(work, config=config), out_shardings=_everywhere(config))


def _everywhere(config: TableConfig) -> NamedSharding | None:
    return None if config.mesh is None else NamedSharding(config.mesh, P())


def _refresh(
    state: TableState, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> tuple[TableState, RefreshStats]:
    size = embedding_VD.shape[0]
    fingerprint = _fingerprint(embedding_VD)
    known = state.fingerprint == fingerprint
    embedding_VD, eligible, bounds = exact.replicate((embedding_VD, eligible, state.bounds), config.mesh)
    suspect_V = known & ~(bounds.drift_V < bounds.margin_V)
    bounds, failed_V = _rescore(bounds, suspect_V, embedding_VD, eligible, config)
    failed_V = failed_V | ~known  # the bounds are about another matrix: nothing of it is of use
    failures = jnp.sum(failed_V, dtype=jnp.int32)
    full = failures > int(_FULL_BUILD * size)
    bounds = jax.lax.switch(
        jnp.where(full, 2, jnp.minimum(failures, 1)),
        [
            lambda: bounds,
            lambda: _search(bounds, failed_V, embedding_VD, eligible, config),
            lambda: _build(embedding_VD, eligible, config),
        ],
    )
    stats = RefreshStats(jnp.sum(suspect_V, dtype=jnp.int32), jnp.where(full, size, failures), full)
    return TableState(bounds, fingerprint), stats


def _build(embedding_VD: jax.Array, eligible: Eligible, config: TableConfig) -> RowBounds:
    """Everything from nothing."""
    size = embedding_VD.shape[0]
    found = exact.nearest(
        embedding_VD,
        eligible,
        count=config.candidates(size),
        neighbors=config.neighbors,
        metric=config.metric,
        tile=config.tile,
        mesh=config.mesh,
    )
    index = exact.make_index(embedding_VD, eligible, config.metric, jnp.arange(size))
    margin_V = _margin(index, jnp.arange(size), found, config)
    return RowBounds(found.ids_RC, found.rest_bound_R, margin_V, jnp.zeros(size))


def _rescore(
    bounds: RowBounds, suspect_V: jax.Array, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> tuple[RowBounds, jax.Array]:
    """Scores the candidates of suspect rows again; bool [V] says where that was not enough."""

    def work(part, embedding_VD, eligible, marked_R, bounds):
        index = exact.make_index(
            embedding_VD, eligible, config.metric, jnp.arange(embedding_VD.shape[0], dtype=jnp.int32)
        )
        first = part * marked_R.shape[0]

        def again(given: tuple[RowBounds, jax.Array], places_B: jax.Array) -> tuple[RowBounds, jax.Array]:
            bounds, failed_R = given
            ids_B = exact.clamp_ids(index, first + places_B)
            candidates_BC, scores_BC = exact.order(index, ids_B, bounds.ids_VC[places_B], config.metric)
            rest_bound_B = _above(bounds.rest_bound_V[places_B] + bounds.drift_V[places_B])
            found = Nearest(candidates_BC, scores_BC, rest_bound_B)
            certain_B = exact.is_certified(index, ids_B, found, config.neighbors, config.metric)
            bounds = _put(bounds, places_B, found, _margin(index, ids_B, found, config))
            return bounds, failed_R.at[places_B].set(~certain_B)

        batch = min(exact.rerank_batch(index, bounds.ids_VC.shape[1]), marked_R.shape[0])
        return exact.scan_selected(marked_R, batch, (bounds, jnp.zeros_like(marked_R)), again)

    return _by_rows(work, config, embedding_VD, eligible, suspect_V, bounds)


def _search(
    bounds: RowBounds, failed_V: jax.Array, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> RowBounds:
    """Searches the failed rows anew."""

    def work(part, embedding_VD, eligible, marked_R, bounds):
        index = exact.make_index(embedding_VD, eligible, config.metric)
        first = part * marked_R.shape[0]

        def again(bounds: RowBounds, places_B: jax.Array) -> RowBounds:
            ids_B = exact.clamp_ids(index, first + places_B)
            found = exact.brute_force(index, ids_B, bounds.ids_VC.shape[1], config.metric)
            return _put(bounds, places_B, found, _margin(index, ids_B, found, config))

        batch = min(max(1, config.tile // 32), marked_R.shape[0])
        return exact.scan_selected(marked_R, batch, bounds, again)

    return _by_rows(work, config, embedding_VD, eligible, failed_V, bounds)


def _by_rows(work, config: TableConfig, embedding_VD, eligible, marked_V, bounds: RowBounds):
    """`work` on each device's share of the rows of `marked_V` and `bounds`."""
    size = embedding_VD.shape[0]
    parts = 1 if config.mesh is None else config.mesh.size
    marked_V, bounds = jax.tree.map(
        lambda x: jnp.pad(x, ((0, -size % parts),) + ((0, 0),) * (x.ndim - 1)), (marked_V, bounds)
    )
    run = exact.divided(work, config.mesh, whole=2, out=P(AXIS))
    return jax.tree.map(lambda x: x[:size], run(embedding_VD, eligible, marked_V, bounds))


def _put(bounds: RowBounds, places_B: jax.Array, found: Nearest, margin_B: jax.Array) -> RowBounds:
    return bounds._replace(
        ids_VC=bounds.ids_VC.at[places_B].set(found.ids_RC),
        rest_bound_V=bounds.rest_bound_V.at[places_B].set(found.rest_bound_R),
        margin_V=bounds.margin_V.at[places_B].set(margin_B),
        drift_V=bounds.drift_V.at[places_B].set(0.0),
    )


def _margin(index: SearchIndex, ids_R: jax.Array, found: Nearest, config: TableConfig) -> jax.Array:
    """Half of the smallest gap whose closing would change the table, less what rounding can hide: [R].

    Two closenesses that each move by less than half of their gap keep their order.
    """
    width = index.rows_VD.shape[1]
    closeness_RC, error_RC = nearness.pair_closeness(
        found.scores_RC, index.length_V[ids_R], index.longest, width, config.metric
    )
    low_RC, high_RC = closeness_RC - error_RC, closeness_RC + error_RC
    last = config.neighbors
    high_RC = jnp.where(jnp.isneginf(closeness_RC), -jnp.inf, high_RC)
    gap_R = low_RC[:, last - 1] - found.rest_bound_R
    if last < high_RC.shape[1]:
        gap_R = jnp.minimum(gap_R, low_RC[:, last - 1] - high_RC[:, last])
    if last > 1:
        gap_R = jnp.minimum(gap_R, jnp.min(low_RC[:, : last - 1] - high_RC[:, 1:last], axis=1))
    return gap_R * (0.5 - 4 * UNIT)


def _change(before_VD: jax.Array, after_VD: jax.Array, valid_V: jax.Array, metric: str) -> jax.Array:
    """How much the closeness of each row to any valid row may have changed, rounded up: float32 [V]."""
    width = before_VD.shape[1]
    relative = 1.0 + (2 * width + 16) * UNIT
    lost = float(np.sqrt(width * np.finfo(np.float32).tiny))  # squares too small for a float count as nothing

    def length(x_VD: jax.Array) -> jax.Array:  # one pass, where nearness.lengths takes two
        if metric == "l1":
            return jnp.sum(jnp.abs(x_VD), axis=1)
        return jnp.sqrt(jnp.sum(jnp.square(x_VD), axis=1))

    def largest(x_V: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(valid_V, x_V, 0.0))

    step_V = length(after_VD - before_VD) * relative + lost
    if metric in ("l1", "l2"):  # the triangle inequality, once for each end
        return _above(step_V + largest(step_V))
    was_V, is_V = length(before_VD), length(after_VD)
    if metric == "dot":  # a'·b' - a·b = (a' - a)·b' + a·(b' - b)
        was_V, is_V = was_V + lost, is_V + lost
        return _above((step_V * largest(is_V) + was_V * largest(step_V)) * relative)
    # |a'/|a'| - a/|a|| ≤ 2 |a' - a| / (|a'| + |a|): Dunkl and Williams, 1964
    total_V = was_V + is_V
    turn_V = 2.0 * step_V / jnp.where(total_V > 0, total_V, 1.0) * relative
    turn_V = jnp.where((total_V > 0) & jnp.isfinite(total_V), jnp.minimum(turn_V, 2.0), 2.0)
    return _above(turn_V + largest(turn_V))


def _above(x: jax.Array) -> jax.Array:
    """At least the real sum or product of which x is the rounded one."""
    return x + 4 * UNIT * jnp.abs(x)


def _fingerprint(rows_VD: jax.Array) -> jax.Array:
    """uint32 [] of the bits of some thousand rows, evenly spread: the same however the matrix is sharded.

    An optimiser changes every row, so that these few tell two states of a matrix apart.
    """
    some_VD = rows_VD[:: max(1, rows_VD.shape[0] // _FINGERPRINT_ROWS)].astype(jnp.float32)
    places_V = jnp.arange(some_VD.shape[0], dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
    hash_V = nearness.row_hash(some_VD, 0x9E3779B9)
    return jnp.sum((hash_V ^ (hash_V >> 15)) * places_V, dtype=jnp.uint32)
