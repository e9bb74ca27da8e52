"""A neighbour table that follows its matrix: what an update cannot have changed is not computed again.

Owns the bounds. For each row the state keeps its best candidates, a bound on the closeness of all others, and
how much the row's scores may have moved since both were established. While that is less than half of the
smallest gap that matters, the row's part of the table stands as it is. Otherwise its candidates are scored
again; if the last wanted one is still above the bound for the others, that is all, and if not the row is
searched anew. So the table is always the exact one. docs/method.md derives the bounds.

The state holds no copy of the matrix: `follow` is shown the matrix before and after each change. A mark of
the matrix that it stands for keeps this honest: from any other matrix `refresh` builds everything anew. Which
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
from ngrpo_jax.algo.neighbors.exact import AXIS, Field, Nearest
from ngrpo_jax.algo.neighbors.nearness import UNIT

# Where more rows than this share fail, building all of them anew is cheaper than searching each alone.
_FULL_BUILD = 0.25
_MARKED = 4096  # rows that tell one state of a matrix from another


class Kept(NamedTuple):
    """What is kept of each row: 4 (C + 3) bytes.

    ids_VC      candidates, nearest first; -1 where there are no more
    outside_V   bounds the closeness of all other eligible rows, as it was before `moved_V`
    margin_V    the first k-1 candidates and their order stand while `moved_V` is below
    moved_V     how much any closeness of this row may have changed
    """

    ids_VC: jax.Array
    outside_V: jax.Array
    margin_V: jax.Array
    moved_V: jax.Array


class Maintained(NamedTuple):
    """A table and its bounds, and the mark of the matrix that they are about: a hash, uint32 []."""

    kept: Kept
    mark: jax.Array


class Effort(NamedTuple):
    """What a refresh did: rows whose candidates were scored again, rows searched anew, whether all were."""

    rescored: jax.Array
    searched: jax.Array
    full: jax.Array


@dataclasses.dataclass(frozen=True)
class Upkeep:
    """How a table is kept: its k and metric, and the mesh over which the work is divided."""

    k: int
    metric: str = "cosine"
    mesh: Mesh | None = None
    spare: int = exact.SPARE
    tile: int = exact.TILE

    @property
    def sure(self) -> int:
        """Candidates that have to be the nearest, in order."""
        return max(1, self.k - 1)

    def count(self, size: int) -> int:
        """Candidates kept of a row."""
        return min(self.sure + self.spare, size)

    def shapes(self, size: int) -> Maintained:
        """The state of a matrix of `size` rows as jax.ShapeDtypeStruct."""
        return jax.eval_shape(lambda: _nothing(size, self))

    def cost(self, effort: Effort, size: int) -> float:
        """Scores that a refresh has computed, as a share of those that building all anew computes."""
        count = self.count(size)
        whole = size * (size / 2 if exact.by_tiles(size, count, self.tile) else size)
        again = int(effort.rescored) * count
        return (again + (whole if effort.full else int(effort.searched) * size)) / whole


def nothing(size: int, upkeep: Upkeep) -> Maintained:
    """The state of no matrix, from which `refresh` builds everything."""
    return jax.jit(lambda: _nothing(size, upkeep), out_shardings=_everywhere(upkeep))()


def _nothing(size: int, upkeep: Upkeep) -> Maintained:
    unknown_V = jnp.full(size, jnp.inf, jnp.float32)
    nobody_VC = jnp.full((size, upkeep.count(size)), -1, jnp.int32)
    return Maintained(Kept(nobody_VC, unknown_V, -unknown_V, unknown_V), jnp.uint32(0))


def table(state: Maintained, upkeep: Upkeep) -> jax.Array:
    """The neighbour table [V, k], exact after `refresh`."""
    return exact.as_table(state.kept.ids_VC, upkeep.k)


def follow(
    state: Maintained, before_VD: jax.Array, after_VD: jax.Array, eligible: Eligible, upkeep: Upkeep
) -> Maintained:
    """The same table with bounds that hold for `after_VD`, where it was about `before_VD`.

    Two passes over the matrices, in whatever sharding they have.
    """
    return _program(_follow, upkeep)(state, before_VD, after_VD, eligible)


def _follow(
    state: Maintained, before_VD: jax.Array, after_VD: jax.Array, eligible: Eligible, upkeep: Upkeep
) -> Maintained:
    known = state.mark == _mark(before_VD)
    change_V = _change(
        before_VD.astype(jnp.float32), after_VD.astype(jnp.float32), eligible.valid_V, upkeep.metric
    )
    moved_V = _above(jnp.where(known, state.kept.moved_V, jnp.inf) + change_V)
    return Maintained(state.kept._replace(moved_V=moved_V), _mark(after_VD))


def refresh(
    state: Maintained, embedding_VD: jax.Array, eligible: Eligible, upkeep: Upkeep
) -> tuple[Maintained, Effort]:
    """The state with the exact table of `embedding_VD`, for which `follow` has prepared it."""
    return _program(_refresh, upkeep)(state, embedding_VD, eligible)


@functools.cache
def _program(work: Callable, upkeep: Upkeep) -> Callable:
    """`work` compiled. States always lie the same way, or every program would be compiled for each way."""
    return jax.jit(functools.partial(work, upkeep=upkeep), out_shardings=_everywhere(upkeep))


def _everywhere(upkeep: Upkeep) -> NamedSharding | None:
    return None if upkeep.mesh is None else NamedSharding(upkeep.mesh, P())


def _refresh(
    state: Maintained, embedding_VD: jax.Array, eligible: Eligible, upkeep: Upkeep
) -> tuple[Maintained, Effort]:
    size = embedding_VD.shape[0]
    mark = _mark(embedding_VD)
    known = state.mark == mark
    embedding_VD, eligible, kept = exact.replicate((embedding_VD, eligible, state.kept), upkeep.mesh)
    suspect_V = known & ~(kept.moved_V < kept.margin_V)
    kept, failed_V = _rescore(kept, suspect_V, embedding_VD, eligible, upkeep)
    failed_V = failed_V | ~known  # what is kept is about another matrix: nothing of it is of use
    failures = jnp.sum(failed_V, dtype=jnp.int32)
    full = failures > int(_FULL_BUILD * size)
    kept = jax.lax.switch(
        jnp.where(full, 2, jnp.minimum(failures, 1)),
        [
            lambda: kept,
            lambda: _search(kept, failed_V, embedding_VD, eligible, upkeep),
            lambda: _build(embedding_VD, eligible, upkeep),
        ],
    )
    effort = Effort(jnp.sum(suspect_V, dtype=jnp.int32), jnp.where(full, size, failures), full)
    return Maintained(kept, mark), effort


def _build(embedding_VD: jax.Array, eligible: Eligible, upkeep: Upkeep) -> Kept:
    """Everything from nothing."""
    size = embedding_VD.shape[0]
    found = exact.nearest(
        embedding_VD,
        eligible,
        count=upkeep.count(size),
        sure=upkeep.sure,
        metric=upkeep.metric,
        tile=upkeep.tile,
        mesh=upkeep.mesh,
    )
    field = exact.make_field(embedding_VD, eligible, upkeep.metric, jnp.arange(size))
    margin_V = _margin(field, jnp.arange(size), found, upkeep)
    return Kept(found.ids_RC, found.outside_R, margin_V, jnp.zeros(size))


def _rescore(
    kept: Kept, suspect_V: jax.Array, embedding_VD: jax.Array, eligible: Eligible, upkeep: Upkeep
) -> tuple[Kept, jax.Array]:
    """Scores the candidates of suspect rows again; bool [V] says where that was not enough."""

    def work(part, embedding_VD, eligible, marked_R, kept):
        field = exact.make_field(
            embedding_VD, eligible, upkeep.metric, jnp.arange(embedding_VD.shape[0], dtype=jnp.int32)
        )
        first = part * marked_R.shape[0]

        def again(given: tuple[Kept, jax.Array], places_B: jax.Array) -> tuple[Kept, jax.Array]:
            kept, failed_R = given
            ids_B = exact.within(field, first + places_B)
            candidates_BC, scores_BC = exact.order(field, ids_B, kept.ids_VC[places_B], upkeep.metric)
            outside_B = _above(kept.outside_V[places_B] + kept.moved_V[places_B])
            found = Nearest(candidates_BC, scores_BC, outside_B)
            certain_B = exact.certain(field, ids_B, found, upkeep.sure, upkeep.metric)
            kept = _put(kept, places_B, found, _margin(field, ids_B, found, upkeep))
            return kept, failed_R.at[places_B].set(~certain_B)

        batch = min(exact.judged_rows(field, kept.ids_VC.shape[1]), marked_R.shape[0])
        return exact.over_marked(marked_R, batch, (kept, jnp.zeros_like(marked_R)), again)

    return _by_rows(work, upkeep, embedding_VD, eligible, suspect_V, kept)


def _search(
    kept: Kept, failed_V: jax.Array, embedding_VD: jax.Array, eligible: Eligible, upkeep: Upkeep
) -> Kept:
    """Searches the failed rows anew."""

    def work(part, embedding_VD, eligible, marked_R, kept):
        field = exact.make_field(embedding_VD, eligible, upkeep.metric)
        first = part * marked_R.shape[0]

        def again(kept: Kept, places_B: jax.Array) -> Kept:
            ids_B = exact.within(field, first + places_B)
            found = exact.search(field, ids_B, kept.ids_VC.shape[1], upkeep.metric)
            return _put(kept, places_B, found, _margin(field, ids_B, found, upkeep))

        batch = min(max(1, upkeep.tile // 32), marked_R.shape[0])
        return exact.over_marked(marked_R, batch, kept, again)

    return _by_rows(work, upkeep, embedding_VD, eligible, failed_V, kept)


def _by_rows(work, upkeep: Upkeep, embedding_VD, eligible, marked_V, kept: Kept):
    """`work` on each device's share of the rows of `marked_V` and `kept`."""
    size = embedding_VD.shape[0]
    parts = 1 if upkeep.mesh is None else upkeep.mesh.size
    marked_V, kept = jax.tree.map(
        lambda x: jnp.pad(x, ((0, -size % parts),) + ((0, 0),) * (x.ndim - 1)), (marked_V, kept)
    )
    run = exact.divided(work, upkeep.mesh, whole=2, out=P(AXIS))
    return jax.tree.map(lambda x: x[:size], run(embedding_VD, eligible, marked_V, kept))


def _put(kept: Kept, places_B: jax.Array, found: Nearest, margin_B: jax.Array) -> Kept:
    return kept._replace(
        ids_VC=kept.ids_VC.at[places_B].set(found.ids_RC),
        outside_V=kept.outside_V.at[places_B].set(found.outside_R),
        margin_V=kept.margin_V.at[places_B].set(margin_B),
        moved_V=kept.moved_V.at[places_B].set(0.0),
    )


def _margin(field: Field, ids_R: jax.Array, found: Nearest, upkeep: Upkeep) -> jax.Array:
    """Half of the smallest gap whose closing would change the table, less what rounding can hide: [R].

    Two closenesses that each move by less than half of their gap keep their order.
    """
    width = field.rows_VD.shape[1]
    closeness_RC, error_RC = nearness.pair_closeness(
        found.scores_RC, field.length_V[ids_R], field.longest, width, upkeep.metric
    )
    low_RC, high_RC = closeness_RC - error_RC, closeness_RC + error_RC
    last = upkeep.sure
    high_RC = jnp.where(jnp.isneginf(closeness_RC), -jnp.inf, high_RC)
    gap_R = low_RC[:, last - 1] - found.outside_R
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


def _mark(rows_VD: jax.Array) -> jax.Array:
    """uint32 [] of the bits of some thousand rows, evenly spread: the same however the matrix is sharded.

    An optimiser changes every row, so that these few tell two states of a matrix apart.
    """
    some_VD = rows_VD[:: max(1, rows_VD.shape[0] // _MARKED)].astype(jnp.float32)
    places_V = jnp.arange(some_VD.shape[0], dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
    hash_V = nearness.row_hash(some_VD, 0x9E3779B9)
    return jnp.sum((hash_V ^ (hash_V >> 15)) * places_V, dtype=jnp.uint32)
