"""The neighbour table: for each row of an embedding matrix, its nearest other rows.

Owns the exact search: for all rows from nothing (`nearest`), and for a few given ones (`brute_force`),
divided over the devices of a mesh. Must not know: tokenizers (which rows may be neighbours arrives as masks),
mixtures, which of a model's matrices it is given, or that it may change.

Exactness. A matrix product rounds differently from one tile to the next, so it only nominates. The candidates
are scored again from their rows by one formula and ordered by (score, lower id). A row is done when the score
of the last wanted one is above everything that was not nominated, by more than rounding can do; the few other
rows are searched alone, against all rows. There, rows with the same bits share one nomination score, so that
ties among them go to the lower id however many there are.

Letters of this file: R rows that are searched for, G groups of columns, M columns of a group, or of some.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ngrpo_jax.algo.neighbors import nearness, tiles
from ngrpo_jax.algo.neighbors.eligibility import Eligible, eligible_rows
from ngrpo_jax.algo.neighbors.nearness import METRICS

# Nominated beyond the wanted ones, so that few rows fail for want of a gap: tokens that were hardly trained
# have nearly equal rows, about twenty of them in real models, and other rows have them all in one breath.
SPARE = 17
TILE = 2048  # rows of a tile: the products run at full speed and two tiles fit into a cache of 32 MiB
_GROUP = 64  # neighbouring columns whose maximum stands for them in a search for a few rows
_JUDGED = 2**19  # entries of the gathered candidates that are scored at once: two megabytes, within a cache
AXIS = "rows"  # the one axis of the mesh that a search runs on


class Nearest(NamedTuple):
    """Of R rows: candidates, nearest first, of equals the lower id first.

    Where there are no more, the id is -1 and the score -inf. `scores_RC` are those of
    `nearness.pair_scores`, `rest_bound_R` bounds the closeness of all other eligible rows.
    """

    ids_RC: jax.Array
    scores_RC: jax.Array
    rest_bound_R: jax.Array


class SearchIndex(NamedTuple):
    """All rows that a search looks at, as `nearness.comparable_rows` gives them, whole on every device."""

    rows_VD: jax.Array
    eligible: Eligible
    first_V: jax.Array  # lowest id among the rows with the same bits
    length_V: jax.Array
    longest: jax.Array  # of the valid rows


def neighbor_table(
    embedding_VD: jax.Array | np.ndarray,
    k: int,
    *,
    metric: str = "cosine",
    valid_V: jax.Array | np.ndarray | None = None,
    group_V: jax.Array | np.ndarray | None = None,
    tile: int = TILE,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The candidates of every row as an anchor, (7) of arXiv 2606.10768: int32 [V, k].

    Column 0 is the row itself, columns 1.. its k-1 nearest other valid rows, nearest first, of equally
    near ones the lower id first. `metric`: "cosine" (8), where a zero row has cosine 0 to every row, "l2",
    "l1" or "dot". `valid_V` bool [V] (default: all) says which rows may be neighbours; a row that may not
    still has its own k-1 neighbours. `group_V` integer [V]: rows whose group equals the anchor's are never
    its neighbours (the row itself stays column 0). `embedding_VD` of any float dtype is compared in float32.

    Memory: the rows, one tile × tile block of scores and tile / 2 integers a row. `mesh` divides the work
    (not the rows: each device holds a whole copy of them) over all its devices, whatever the sharding of
    `embedding_VD`; the table is then replicated.

    Raises ValueError for an unknown metric, a k below 1 or above the number of valid rows (of other groups,
    where there are groups), and for arguments that are not [V, D] and [V].
    """
    if np.ndim(embedding_VD) != 2 or not np.size(embedding_VD):
        raise ValueError(
            f"embedding_VD must be a matrix [V, D], not an array of shape {np.shape(embedding_VD)}"
        )
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown: use one of {', '.join(METRICS)}")
    size = embedding_VD.shape[0]
    eligible = eligible_rows(size, k, valid_V, group_V)
    if k == 1:
        return jnp.arange(size, dtype=jnp.int32)[:, None]
    count = min(k - 1 + SPARE, size)
    build = _compiled(count=count, neighbors=k - 1, metric=metric, tile=tile, mesh=mesh)
    return as_table(build(jnp.asarray(embedding_VD), eligible).ids_RC, k)


@functools.partial(jax.jit, static_argnames="k")
def as_table(ids_VC: jax.Array, k: int) -> jax.Array:
    """int32 [V, k]: each row itself, then its first k-1 candidates."""
    own_V1 = jnp.arange(ids_VC.shape[0], dtype=jnp.int32)[:, None]
    return jnp.concatenate([own_V1, ids_VC[:, : k - 1]], axis=1)


def uses_tiles(size: int, count: int, tile: int) -> bool:
    """Whether all rows are searched by tiles, at half of the products; or each alone, being few."""
    return size >= 4 * tile and count <= tile // 4


def divided(work: Callable, mesh: Mesh | None, *, whole: int, out: Any) -> Callable:
    """`work(part, *arguments)` on every device of `mesh`, each with its number as `part`.

    The first `whole` arguments go to every device entire, the others split by their leading dimension. `out`
    is P(AXIS), for results that are put together by their leading dimension, or a tree with P() for what all
    devices agree on. Without a mesh, or on one device, `work` runs as part 0 of 1.
    """
    if mesh is None or mesh.size == 1:
        return lambda *arguments: work(jnp.int32(0), *arguments)
    line = line_of(mesh)

    def on_mesh(*arguments: Any) -> Any:
        specs = tuple(P() if i < whole else P(AXIS) for i in range(len(arguments)))
        body = lambda *given: work(jax.lax.axis_index(AXIS).astype(jnp.int32), *given)  # noqa: E731
        return jax.shard_map(body, mesh=line, in_specs=specs, out_specs=out, check_vma=False)(*arguments)

    return on_mesh


def line_of(mesh: Mesh) -> Mesh:
    """The same devices in the same order along one axis."""
    return Mesh(mesh.devices.reshape(-1), (AXIS,))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Within a compiled program: whole copies on every device."""
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(line_of(mesh), P()))


@functools.cache
def _compiled(*, count: int, neighbors: int, metric: str, tile: int, mesh: Mesh | None) -> Callable:
    given = functools.partial(nearest, count=count, neighbors=neighbors, metric=metric, tile=tile, mesh=mesh)
    return jax.jit(given)


def nearest(
    embedding_VD: jax.Array,
    eligible: Eligible,
    *,
    count: int,
    neighbors: int,
    metric: str,
    tile: int,
    mesh: Mesh | None,
) -> Nearest:
    """`count` candidates of every row, the first `neighbors` its nearest. Within a compiled program."""
    size = embedding_VD.shape[0]
    parts = 1 if mesh is None else mesh.size
    if uses_tiles(size, count, tile):
        tiling = tiles.make_tiling(size, tile, parts)
        build = functools.partial(_by_tiles, tiling=tiling)
    else:
        build = functools.partial(_one_by_one, chunk=-(-size // parts), batch=max(1, tile // 32))
    build = functools.partial(build, count=count, neighbors=neighbors, metric=metric, parts=parts)
    embedding_VD, eligible = replicate((embedding_VD, eligible), mesh)
    found = divided(build, mesh, whole=2, out=P(AXIS))(embedding_VD, eligible)
    return replicate(Nearest(*(x[:size] for x in found)), mesh)


def make_index(
    embedding_VD: jax.Array, eligible: Eligible, metric: str, first_V: jax.Array | None = None
) -> SearchIndex:
    """What a search over these rows needs to know of them; `first_V` is found where it is not given."""
    if first_V is None:
        first_V = nearness.first_identical(embedding_VD.astype(jnp.float32))
    rows_VD = nearness.comparable_rows(embedding_VD, metric)
    length_V = nearness.lengths(rows_VD, metric)
    longest = jnp.max(jnp.where(eligible.valid_V, length_V, 0.0))
    return SearchIndex(rows_VD, eligible, first_V, length_V, longest)


def _one_by_one(part, embedding_VD, eligible, *, count, neighbors, metric, parts, chunk, batch) -> Nearest:
    """A part's rows, each searched alone: for matrices so small that nothing else pays."""
    del parts, neighbors
    index = make_index(embedding_VD, eligible, metric)
    empty = Nearest(
        jnp.zeros((chunk, count), jnp.int32), jnp.zeros((chunk, count), jnp.float32), jnp.zeros(chunk)
    )
    everything = jnp.ones(chunk, bool)
    return search_selected(index, part * chunk, everything, empty, metric, min(batch, chunk))


def _by_tiles(part, embedding_VD, eligible, *, count, neighbors, metric, parts, tiling) -> Nearest:
    """A part's rows, nominated by tiles, judged, and searched alone where that leaves a doubt."""
    index = make_index(embedding_VD, eligible, metric)
    size = embedding_VD.shape[0]
    own, padding = tiling.blocks // parts, tiling.rows - size
    padded_VD = jnp.pad(index.rows_VD, ((0, padding), (0, 0)))
    padded = jax.tree.map(lambda x: jnp.pad(x, (0, padding)), eligible)
    of_rows, of_columns = tiles.find_candidates(padded_VD, padded, part * own, own, count, metric, tiling)
    if parts > 1:  # of_columns is about everybody's rows: to each its own, one list from each other part

        def deal(x: jax.Array) -> list[jax.Array]:
            dealt = jax.lax.all_to_all(x.reshape(parts, -1, *x.shape[1:]), AXIS, 0, 0)
            return [dealt[i] for i in range(parts)]

        columns = [deal(x) for x in of_columns]
        lists = [of_rows, *(tiles.Candidates(*each) for each in zip(*columns, strict=True))]
    else:
        lists = [of_rows, of_columns]
    candidates = tiles.merge(lists, tiling)

    chunk = own * tiling.tile
    first = part * chunk
    most = rerank_batch(index, count)
    block = max(b for b in range(1, tiling.tile + 1) if tiling.tile % b == 0 and b <= most)
    by_block = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), candidates)
    ids = (first + jnp.arange(chunk, dtype=jnp.int32)).reshape(-1, block)
    found = jax.lax.map(lambda given: rerank(index, given[0], given[1], metric), (ids, by_block))
    found = jax.tree.map(lambda x: x.reshape(chunk, *x.shape[2:]), found)
    rows = clamp_ids(index, first + jnp.arange(chunk, dtype=jnp.int32))
    doubtful_R = ~is_certified(index, rows, found, neighbors, metric) & (first + jnp.arange(chunk) < size)
    return search_selected(index, first, doubtful_R, found, metric, max(1, tiling.tile // 32))


def rerank_batch(index: SearchIndex, count: int) -> int:
    """How many rows with so many candidates each are scored at once."""
    return max(1, _JUDGED // (count * index.rows_VD.shape[1]))


def clamp_ids(index: SearchIndex, ids_R: jax.Array) -> jax.Array:
    """Row numbers, those of padding replaced by the last row's."""
    return jnp.minimum(ids_R, index.rows_VD.shape[0] - 1)


def rerank(index: SearchIndex, ids_R: jax.Array, candidates: tiles.Candidates, metric: str) -> Nearest:
    """Candidates of the rows `ids_R`, scored from their rows and put in order."""
    ids_R = clamp_ids(index, ids_R)
    candidates_RC = jnp.where(jnp.isneginf(candidates.scores_RC), -1, candidates.ids_RC)
    ids_RC, scores_RC = order(index, ids_R, candidates_RC, metric)
    error_R = nearness.tile_error(index.length_V[ids_R], index.longest, index.rows_VD.shape[1], metric)
    return Nearest(ids_RC, scores_RC, nearness.closeness_above(candidates.rest_bound_R, error_R, metric))


def order(
    index: SearchIndex, ids_R: jax.Array, candidates_RC: jax.Array, metric: str
) -> tuple[jax.Array, jax.Array]:
    """(ids, scores) of the rows' candidates by (score, lower id); id -1 is no candidate and scores -inf."""
    scores_RC = nearness.pair_scores(index.rows_VD[ids_R][:, None, :], index.rows_VD[candidates_RC], metric)
    scores_RC = jnp.where(candidates_RC >= 0, scores_RC, -jnp.inf)
    falling_RC, ordered_RC = jax.lax.sort((-scores_RC, candidates_RC), dimension=1, num_keys=2)
    return ordered_RC, -falling_RC


def is_certified(
    index: SearchIndex, ids_R: jax.Array, found: Nearest, neighbors: int, metric: str
) -> jax.Array:
    """bool [R]: no row outside the candidates can be among the `neighbors` nearest."""
    least_R, error_R = nearness.pair_closeness(
        found.scores_RC[:, neighbors - 1],
        index.length_V[ids_R],
        index.longest,
        index.rows_VD.shape[1],
        metric,
    )
    return least_R - error_R > found.rest_bound_R


def search_selected(
    index: SearchIndex, first: jax.Array, wanted_R: jax.Array, found: Nearest, metric: str, batch: int
) -> Nearest:
    """`found`, of the rows from `first` on, with the marked ones searched alone, `batch` at once."""
    batch = min(batch, wanted_R.shape[0])
    count = found.ids_RC.shape[1]

    def again(given: Nearest, places_B: jax.Array) -> Nearest:
        new = brute_force(index, clamp_ids(index, first + places_B), count, metric)
        return Nearest(*(old.at[places_B].set(x) for old, x in zip(given, new, strict=True)))

    return scan_selected(wanted_R, batch, found, again)


def scan_selected(wanted_R: jax.Array, batch: int, start: Any, step: Callable[[Any, jax.Array], Any]) -> Any:
    """`step(value, places_B)` over batches of the marked places; the last batch is filled with others."""
    size = wanted_R.shape[0]
    places_R = jnp.argsort(~wanted_R, stable=True).astype(jnp.int32)
    total = jnp.sum(wanted_R, dtype=jnp.int32)

    def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        done, value = carry
        places_B = jax.lax.dynamic_slice_in_dim(places_R, jnp.minimum(done, size - batch), batch)
        return done + batch, step(value, places_B)

    return jax.lax.while_loop(lambda carry: carry[0] < total, body, (jnp.int32(0), start))[1]


def brute_force(index: SearchIndex, ids_R: jax.Array, count: int, metric: str) -> Nearest:
    """The `count` nearest of the rows `ids_R`, each compared with all rows."""
    scores_RV = nearness.tile_scores(index.rows_VD[ids_R], index.rows_VD, metric)
    has_twins = jnp.any(index.first_V != jnp.arange(index.first_V.shape[0], dtype=jnp.int32))
    scores_RV = jax.lax.cond(has_twins, lambda s: jnp.take(s, index.first_V, axis=1), lambda s: s, scores_RV)
    top_RC, found_RC = _top(jnp.where(index.eligible.pairs(ids_R), scores_RV, -jnp.inf), count)
    return rerank(index, ids_R, tiles.Candidates(top_RC, found_RC, jnp.min(top_RC, axis=1)), metric)


def _top(scores_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` best of each row and their places, of equals the lower place.

    The best entries lie within as many groups of neighbours, those with the best maxima: of equal maxima
    the lower group, because its places are lower. Only these groups are looked into.
    """
    rows, size = scores_RV.shape
    groups = -(-size // _GROUP)
    if groups <= 2 * count:
        return jax.lax.top_k(scores_RV, count)
    padded = jnp.pad(scores_RV, ((0, 0), (0, groups * _GROUP - size)), constant_values=-jnp.inf)
    grouped_RGM = padded.reshape(rows, groups, _GROUP)
    best_RC = jnp.sort(jax.lax.top_k(jnp.max(grouped_RGM, axis=2), count)[1], axis=1)
    within_RM = jnp.take_along_axis(grouped_RGM, best_RC[:, :, None], axis=1).reshape(rows, -1)
    places_RM = (best_RC[:, :, None] * _GROUP + jnp.arange(_GROUP)[None, None, :]).reshape(rows, -1)
    top_RC, place_RC = jax.lax.top_k(within_RM, count)
    return top_RC, jnp.take_along_axis(places_RM, place_RC, axis=1).astype(jnp.int32)
