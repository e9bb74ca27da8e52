"""A neighbour table that is brought up to date after an update, without searching what cannot have changed.

Owns the bounds and their use. Must not know why the matrix changes, when a table is refreshed, or where its
state is stored.

Of each row the state keeps its best candidates, a bound on the closeness of all other eligible rows, and how
much closeness may have drifted since both were computed. While the drift is below half of the smallest gap
that matters (the margin), the row's part of the table stands as it is. Otherwise its candidates are scored
again; where the certificate (search.py) then fails, the row is searched by brute force. So the table after
`refresh` is always the exact one. docs/method.md derives the bounds.

The state holds no copy of the matrix: `add_drift` is given the matrix before and after each change. A
fingerprint says which matrix a state is about; for any other matrix `refresh` builds everything anew. Which
rows are eligible is fixed as long as a state is used: all bounds are about eligible rows alone.

Letters of this file: A rows of one device, Q rows of one batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.neighbors import exact, nearness, search
from ngrpo_jax.algo.neighbors.devices import divided, parts_of, replicate, replicated
from ngrpo_jax.algo.neighbors.eligibility import Eligible
from ngrpo_jax.algo.neighbors.exact import TableConfig, compiled
from ngrpo_jax.algo.neighbors.search import Ranked, SearchIndex

# Where the certificates of more rows than this share fail, one full build costs less than brute force for
# each.
_FULL_BUILD = 0.25
_FINGERPRINT_ROWS = 4096  # rows whose bits tell two states of a matrix apart


class RowBounds(NamedTuple):
    """What a state holds of each row: 4 (C + 3) bytes.

    Attributes:
      ids_VC: candidates, nearest first; -1 where there are no more.
      rest_bound_V: upper bound on the closeness of all other eligible rows, without the drift since.
      margin_V: the first k-1 candidates and their order stand while `drift_V` is below.
      drift_V: how much any closeness of this row may have changed since the other three were computed.
    """

    ids_VC: jax.Array
    rest_bound_V: jax.Array
    margin_V: jax.Array
    drift_V: jax.Array


class TableState(NamedTuple):
    """A table with its bounds, and the fingerprint of the matrix that they are about: a hash, uint32 []."""

    bounds: RowBounds
    fingerprint: jax.Array


class RefreshStats(NamedTuple):
    """What a refresh did: rows whose candidates were scored again, rows searched anew, whether all were."""

    rescored: jax.Array
    searched: jax.Array
    full: jax.Array


def empty_state(size: int, config: TableConfig) -> TableState:
    """The state of no matrix, from which `refresh` builds everything for a matrix of `size` rows."""

    def make() -> TableState:
        unknown_V = jnp.full(size, jnp.inf, jnp.float32)
        none_VC = jnp.full((size, config.candidates(size)), -1, jnp.int32)
        return TableState(RowBounds(none_VC, unknown_V, -unknown_V, unknown_V), jnp.uint32(0))

    return jax.jit(make, out_shardings=replicated(config.mesh))()


def table(state: TableState, config: TableConfig) -> jax.Array:
    """The neighbour table [V, k], exact after `refresh`."""
    return exact.as_table(state.bounds.ids_VC, config.k)


def add_drift(
    state: TableState, before_VD: jax.Array, after_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> TableState:
    """The same table with bounds that hold for `after_VD`, where it was about `before_VD`.

    Two passes over the matrices, in whatever sharding they have.
    """
    return compiled(_add_drift, config)(state, before_VD, after_VD, eligible)


def refresh(
    state: TableState, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> tuple[TableState, RefreshStats]:
    """The state with the exact table of `embedding_VD`, for which `add_drift` has prepared it."""
    return compiled(_refresh, config)(state, embedding_VD, eligible)


def cost(stats: RefreshStats, size: int, config: TableConfig) -> float:
    """Scores that a refresh has computed, as a share of those that a full build computes."""
    build = size * (size / 2 if config.uses_tiles(size) else size)
    rescored = int(stats.rescored) * config.candidates(size)
    return (rescored + (build if stats.full else int(stats.searched) * size)) / build


def _add_drift(
    state: TableState, before_VD: jax.Array, after_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> TableState:
    known = state.fingerprint == _fingerprint(before_VD)
    change_V = nearness.closeness_change(
        before_VD.astype(jnp.float32), after_VD.astype(jnp.float32), eligible.valid_V, config.metric
    )
    drift_V = nearness.round_up(jnp.where(known, state.bounds.drift_V, jnp.inf) + change_V)
    return TableState(state.bounds._replace(drift_V=drift_V), _fingerprint(after_VD))


def _refresh(
    state: TableState, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> tuple[TableState, RefreshStats]:
    size, width = embedding_VD.shape
    fingerprint = _fingerprint(embedding_VD)
    known = state.fingerprint == fingerprint
    embedding_VD, eligible, bounds = replicate((embedding_VD, eligible, state.bounds), config.mesh)
    on_selected = functools.partial(_on_selected, embedding_VD, eligible, config)

    suspect_V = known & ~(bounds.drift_V < bounds.margin_V)
    batch = search.rank_batch(config.candidates(size), width)
    bounds, failed_V = on_selected(_rescore, suspect_V, (bounds, jnp.zeros_like(suspect_V)), batch)
    failed_V = failed_V | ~known  # bounds about another matrix say nothing about this one
    failures = jnp.sum(failed_V, dtype=jnp.int32)
    full = failures > int(_FULL_BUILD * size)
    bounds = jax.lax.switch(
        jnp.where(full, 2, jnp.minimum(failures, 1)),
        [
            lambda: bounds,
            lambda: on_selected(_search, failed_V, bounds, config.brute_force_batch),
            lambda: _build(embedding_VD, eligible, config),
        ],
    )
    stats = RefreshStats(jnp.sum(suspect_V, dtype=jnp.int32), jnp.where(full, size, failures), full)
    return TableState(bounds, fingerprint), stats


def _build(embedding_VD: jax.Array, eligible: Eligible, config: TableConfig) -> RowBounds:
    """Everything from nothing."""
    ranked = exact.nearest(embedding_VD, eligible, config)
    index = search.make_index(embedding_VD, eligible, config.metric)
    return _bounds(index, jnp.arange(index.size), ranked, config)


def _on_selected(
    embedding_VD: jax.Array,
    eligible: Eligible,
    config: TableConfig,
    step: Callable,
    selected_V: jax.Array,
    carry: Any,
    batch: int,
) -> Any:
    """`carry = step(config, index, ids_Q, places_Q, carry)` on batches of the selected rows.

    The leaves of `carry` are [V, ...]; a device has the share [A, ...] of its rows. `ids_Q` are the batch's
    ids in the matrix, `places_Q` its places in that share.
    """

    def work(part, embedding_VD, eligible, selected_A, carry):
        index = search.make_index(embedding_VD, eligible, config.metric)
        first = part * selected_A.shape[0]
        on_batch = lambda carry, places_Q: step(config, index, first + places_Q, places_Q, carry)  # noqa: E731
        return search.scan_selected(on_batch, carry, selected_A, batch)

    size = embedding_VD.shape[0]
    padding = -size % parts_of(config.mesh)
    by_row = jax.tree.map(
        lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)), (selected_V, carry)
    )
    carry = divided(work, config.mesh)(embedding_VD, eligible, *by_row)
    return jax.tree.map(lambda x: x[:size], carry)


def _rescore(
    config: TableConfig,
    index: SearchIndex,
    ids_Q: jax.Array,
    places_Q: jax.Array,
    carry: tuple[RowBounds, jax.Array],
) -> tuple[RowBounds, jax.Array]:
    """Scores the candidates again; bool [A] marks the rows whose certificate fails then."""
    bounds, failed_A = carry
    rest_bound_Q = nearness.round_up(bounds.rest_bound_V[places_Q] + bounds.drift_V[places_Q])
    ranked = Ranked(*search.rank(index, ids_Q, bounds.ids_VC[places_Q]), rest_bound_Q)
    failed_Q = ~search.is_certified(index, ids_Q, ranked, config.neighbors)
    bounds = search.put(bounds, places_Q, _bounds(index, ids_Q, ranked, config))
    return bounds, failed_A.at[places_Q].set(failed_Q)


def _search(
    config: TableConfig, index: SearchIndex, ids_Q: jax.Array, places_Q: jax.Array, bounds: RowBounds
) -> RowBounds:
    """Searches by brute force."""
    ranked = search.brute_force(index, ids_Q, bounds.ids_VC.shape[1])
    return search.put(bounds, places_Q, _bounds(index, ids_Q, ranked, config))


def _bounds(index: SearchIndex, ids_A: jax.Array, ranked: Ranked, config: TableConfig) -> RowBounds:
    """Bounds of rows that were just ranked.

    The margin is half of the smallest gap whose closing would change the table, less what rounding can hide:
    two closenesses that each change by less than half of their gap keep their order.
    """
    closeness_AC, error_AC = nearness.pair_closeness(
        ranked.scores_AC, index.norm_V[ids_A], index.max_norm, index.width, index.metric
    )
    low_AC, high_AC = closeness_AC - error_AC, closeness_AC + error_AC
    high_AC = jnp.where(jnp.isneginf(closeness_AC), -jnp.inf, high_AC)
    last = config.neighbors
    gap_A = low_AC[:, last - 1] - ranked.rest_bound_A
    if last < high_AC.shape[1]:
        gap_A = jnp.minimum(gap_A, low_AC[:, last - 1] - high_AC[:, last])
    if last > 1:
        gap_A = jnp.minimum(gap_A, jnp.min(low_AC[:, : last - 1] - high_AC[:, 1:last], axis=1))
    margin_A = gap_A * (0.5 - 4 * nearness.UNIT)
    return RowBounds(ranked.ids_AC, ranked.rest_bound_A, margin_A, jnp.zeros_like(margin_A))


def _fingerprint(rows_VD: jax.Array) -> jax.Array:
    """uint32 [] of the bits of some thousand rows, evenly spread: the same however the matrix is sharded.

    An optimiser changes every row, so these few tell two states of a matrix apart.
    """
    some_VD = rows_VD[:: max(1, rows_VD.shape[0] // _FINGERPRINT_ROWS)].astype(jnp.float32)
    places_V = jnp.arange(some_VD.shape[0], dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
    hash_V = nearness.row_hash(some_VD, 0x9E3779B9)
    return jnp.sum((hash_V ^ (hash_V >> 15)) * places_V, dtype=jnp.uint32)
