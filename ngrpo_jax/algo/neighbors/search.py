"""Given rows (anchors) against the whole matrix: ranking of candidates, the certificate, brute force.

Owns the order of neighbours and the proof that no other row belongs among them. Must not know where
candidates come from, how rows are divided over devices, or that a matrix may change.

A matrix product rounds differently from one tile to the next, so its scores only select candidates. These are
scored again from their rows by one formula and ordered by (score, lower id). An anchor is certified when the
score of its last wanted neighbour exceeds every score outside the candidates by more than rounding can do.

Letters of this file: A anchors, Q anchors of one batch, U groups of adjacent columns, X columns of the
groups.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.neighbors import nearness
from ngrpo_jax.algo.neighbors.eligibility import Eligible

_GROUP = 64  # adjacent columns whose maximum stands for them in `largest`
_RANKED = 2**19  # entries of gathered rows that are scored at once: two megabytes, within a CPU's cache


@dataclasses.dataclass(frozen=True)
class SearchIndex:
    """The rows that a search compares with, whole on every device, and what it derives from them once.

    Attributes:
      rows_VD: as `nearness.comparable_rows` gives them.
      eligible: which rows may be neighbours of which.
      first_V: int32, the lowest id among the rows with the same bits.
      norm_V: float32, `nearness.norms` of the rows.
      max_norm: the largest norm of a valid row.
      metric: one of `nearness.METRICS`.
    """

    rows_VD: jax.Array
    eligible: Eligible
    first_V: jax.Array
    norm_V: jax.Array
    max_norm: jax.Array
    metric: str

    @property
    def size(self) -> int:
        """V."""
        return self.rows_VD.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.rows_VD.shape[1]


class Candidates(NamedTuple):
    """Candidates of A anchors by the scores of tiles, largest first; score -inf where there are no more.

    `rest_bound_A` is at least the score of every eligible row that is no candidate.
    """

    scores_AC: jax.Array
    ids_AC: jax.Array
    rest_bound_A: jax.Array


class Ranked(NamedTuple):
    """Candidates of A anchors, nearest first, of equally near ones the lower id first.

    Where there are no more, the id is -1 and the score -inf. `scores_AC` are those of `nearness.pair_scores`.
    `rest_bound_A` is at least the closeness of every eligible row that is no candidate.
    """

    ids_AC: jax.Array
    scores_AC: jax.Array
    rest_bound_A: jax.Array


def make_index(embedding_VD: jax.Array, eligible: Eligible, metric: str) -> SearchIndex:
    """The index of a matrix; a program that leaves `first_V` unused does not pay for it."""
    first_V = nearness.first_identical(embedding_VD.astype(jnp.float32))
    rows_VD = nearness.comparable_rows(embedding_VD, metric)
    norm_V = nearness.norms(rows_VD, metric)
    max_norm = jnp.max(jnp.where(eligible.valid_V, norm_V, 0.0))
    return SearchIndex(rows_VD, eligible, first_V, norm_V, max_norm, metric)


def rank(index: SearchIndex, ids_A: jax.Array, candidates_AC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(ids, scores) of the anchors' candidates by (score, lower id); id -1 is none and scores -inf."""
    scores_AC = nearness.pair_scores(
        index.rows_VD[ids_A][:, None, :], index.rows_VD[candidates_AC], index.metric
    )
    scores_AC = jnp.where(candidates_AC >= 0, scores_AC, -jnp.inf)
    falling_AC, ranked_AC = jax.lax.sort((-scores_AC, candidates_AC), dimension=1, num_keys=2)
    return ranked_AC, -falling_AC


def rerank(index: SearchIndex, ids_A: jax.Array, candidates: Candidates) -> Ranked:
    """Candidates of the anchors `ids_A`, scored from their rows and put in order.

    Ids of V or more, such as padding's, read the last row.
    """
    candidates_AC = jnp.where(jnp.isneginf(candidates.scores_AC), -1, candidates.ids_AC)
    ids_AC, scores_AC = rank(index, ids_A, candidates_AC)
    error_A = nearness.tile_error(index.norm_V[ids_A], index.max_norm, index.width, index.metric)
    rest_bound_A = nearness.closeness_bound(candidates.rest_bound_A, error_A, index.metric)
    return Ranked(ids_AC, scores_AC, rest_bound_A)


def rank_batch(count: int, width: int) -> int:
    """How many anchors with so many candidates each are scored at once."""
    return max(1, _RANKED // (count * width))


def is_certified(index: SearchIndex, ids_A: jax.Array, ranked: Ranked, neighbors: int) -> jax.Array:
    """bool [A]: no row outside the candidates can be among the `neighbors` nearest."""
    closeness_A, error_A = nearness.pair_closeness(
        ranked.scores_AC[:, neighbors - 1], index.norm_V[ids_A], index.max_norm, index.width, index.metric
    )
    return closeness_A - error_A > ranked.rest_bound_A


def brute_force(index: SearchIndex, ids_A: jax.Array, count: int) -> Ranked:
    """The `count` nearest rows of the anchors `ids_A`, each compared with all rows.

    Rows with the same bits get one score here, so that ties among them go to the lower id however many they
    are.
    """
    scores_AV = nearness.tile_scores(index.rows_VD[ids_A], index.rows_VD, index.metric)
    has_duplicates = jnp.any(index.first_V != jnp.arange(index.first_V.shape[0], dtype=jnp.int32))
    scores_AV = jax.lax.cond(
        has_duplicates, lambda s: jnp.take(s, index.first_V, axis=1), lambda s: s, scores_AV
    )
    scores_AC, ids_AC = largest(jnp.where(index.eligible.pairs(ids_A), scores_AV, -jnp.inf), count)
    return rerank(index, ids_A, Candidates(scores_AC, ids_AC, jnp.min(scores_AC, axis=1)))


def brute_force_selected(
    index: SearchIndex, first: jax.Array, selected_A: jax.Array, ranked: Ranked, batch: int
) -> Ranked:
    """`ranked`, of the anchors from id `first` on, with the selected ones searched by brute force."""
    count = ranked.ids_AC.shape[1]

    def step(ranked: Ranked, places_Q: jax.Array) -> Ranked:
        return put(ranked, places_Q, brute_force(index, first + places_Q, count))

    return scan_selected(step, ranked, selected_A, batch)


def put(rows: Any, places_Q: jax.Array, new: Any) -> Any:
    """A tree of arrays [A, ...] with the rows `places_Q` replaced by those of the same tree [Q, ...]."""
    return jax.tree.map(lambda old, x: old.at[places_Q].set(x), rows, new)


def scan_selected(
    step: Callable[[Any, jax.Array], Any], carry: Any, selected_A: jax.Array, batch: int
) -> Any:
    """`carry = step(carry, places_Q)` over the selected places of [A], `batch` at a time.

    The last batch is filled up with places that are not selected, or were in an earlier batch.
    """
    size = selected_A.shape[0]
    batch = min(batch, size)
    places_A = jnp.argsort(~selected_A, stable=True).astype(jnp.int32)
    total = jnp.sum(selected_A, dtype=jnp.int32)

    def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        done, carry = state
        places_Q = jax.lax.dynamic_slice_in_dim(places_A, jnp.minimum(done, size - batch), batch)
        return done + batch, step(carry, places_Q)

    return jax.lax.while_loop(lambda state: state[0] < total, body, (jnp.int32(0), carry))[1]


def largest(scores_AV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest scores of each anchor and their columns, of equal scores the lower column.

    They lie in at most `count` groups of adjacent columns, those with the largest maxima (of equal maxima the
    lower group, because its columns are lower), so only these groups are searched.
    """
    anchors, size = scores_AV.shape
    groups = -(-size // _GROUP)
    if groups <= 2 * count:
        return jax.lax.top_k(scores_AV, count)
    padded = jnp.pad(scores_AV, ((0, 0), (0, groups * _GROUP - size)), constant_values=-jnp.inf)
    grouped = padded.reshape(anchors, groups, _GROUP)
    group_AU = jnp.sort(jax.lax.top_k(jnp.max(grouped, axis=2), count)[1], axis=1)
    scores_AX = jnp.take_along_axis(grouped, group_AU[:, :, None], axis=1).reshape(anchors, -1)
    columns_AX = (group_AU[:, :, None] * _GROUP + jnp.arange(_GROUP)[None, None, :]).reshape(anchors, -1)
    top_AC, place_AC = jax.lax.top_k(scores_AX, count)
    return top_AC, jnp.take_along_axis(columns_AX, place_AC, axis=1).astype(jnp.int32)
