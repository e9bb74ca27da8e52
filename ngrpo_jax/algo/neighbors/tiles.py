"""Nominating the nearest rows of every row from half of the score matrix, a tile at a time.

Owns the walk over tiles and what is remembered of each. Must not know how candidates are judged: it returns,
for each row, its few best by rounded score and a bound on all that it did not return.

All four scores are symmetric, so a tile of pairs (i, j) serves the rows i and the rows j, and each pair of
blocks is computed once. A row remembers, of every group of columns that are equal modulo `groups`, the best
score with the column's number in the group packed into its low bits, and the best score that this forgot.
That is two maxima an entry, whatever the number of neighbours; the packing and the forgetting cost no
exactness, because both are in the bound. Memory: `groups` × 2 integers a row, and one tile.

Letters of this file: T rows of a tile, R rows, G groups.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.bits import NEGATIVE_INFINITY, ordered, unordered
from ngrpo_jax.algo.neighbors.eligibility import Eligible
from ngrpo_jax.algo.neighbors.nearness import tile_scores

Best = tuple[jax.Array, jax.Array]  # of every group: its best packed score, and the best one forgotten
Pair = tuple[jax.Array, jax.Array]  # of two blocks
Masks = tuple[Eligible, Eligible]


class Tiling(NamedTuple):
    """`blocks` × `tile` rows, the last ones perhaps padding; `groups` memories a row, which divide a tile."""

    blocks: int
    tile: int
    groups: int

    @property
    def rows(self) -> int:
        return self.blocks * self.tile

    @property
    def low_bits(self) -> int:
        """Mask of the bits of a packed score that say which member of its group it is."""
        return (1 << (self.rows // self.groups - 1).bit_length()) - 1


class Candidates(NamedTuple):
    """Candidates of R rows: best first by packed score, -inf where there are no more."""

    scores_RC: jax.Array
    ids_RC: jax.Array
    rest_bound_R: jax.Array  # at least the score of every eligible row that is no nominee


def make_tiling(size: int, tile: int, devices: int) -> Tiling:
    """Tiles of at most `tile` rows, as many blocks for every device, and as little padding as that leaves."""
    groups = max(1, tile // 4)
    blocks = devices * -(-size // (tile * devices))
    return Tiling(blocks, groups * -(-size // (blocks * groups)), groups)


def find_candidates(
    rows_VD: jax.Array,
    eligible: Eligible,
    first: jax.Array,
    own: int,
    count: int,
    metric: str,
    tiling: Tiling,
) -> tuple[Candidates, Candidates]:
    """Candidates from the tiles whose first block is one of the `own` from `first` on.

    Block i meets itself and the blocks after it, half way round: so all blocks have the same work, and blocks
    may be dealt to devices.

    Args:
      rows_VD, eligible: padded to `tiling.rows`; padding is not valid.

    Returns:
      candidates of the own blocks' rows among the rows they met, and of all rows among the own blocks' rows.
    """
    blocks, tile, groups = tiling
    never = jnp.full((tile, groups), NEGATIVE_INFINITY)

    def block_of(x: Any, index: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * tile, tile), x)

    def meet(met: tuple[Best, Best], here: jax.Array, step: jax.Array) -> tuple[Best, Best]:
        there = (here + step) % blocks
        by_row, by_column = met
        column = tuple(jax.lax.dynamic_index_in_dim(x, there, keepdims=False) for x in by_column)

        # All that is sliced comes in as an operand: sliced inside, the loops below would not vectorise.
        def work(by_row: Best, column: Best, rows: Pair, masks: Masks) -> tuple[Best, Best]:
            scores_TT = _between_groups(tile_scores(*rows, metric), *masks)
            by_row = _remember(by_row, scores_TT, masks[1].valid_V, there, tiling, axis=1)
            return by_row, _remember(column, scores_TT, masks[0].valid_V, here, tiling, axis=0)

        # With an even number of blocks, both ends of the longest step would meet; one of them is enough.
        low_works = jnp.minimum(here, there) % 2 == 0
        wanted = (2 * step != blocks) | ((here < there) == low_works)
        pair = [(block_of(x, here), block_of(x, there)) for x in (rows_VD, eligible)]
        by_row, column = jax.lax.cond(wanted, work, lambda *given: given[:2], by_row, column, *pair)
        by_column = tuple(
            jax.lax.dynamic_update_index_in_dim(x, new, there, 0)
            for x, new in zip(by_column, column, strict=True)
        )
        return by_row, by_column

    def walk(by_column: Best, here: jax.Array) -> tuple[Best, Candidates]:
        a_TD, mask = block_of((rows_VD, eligible), here)
        scores_TT = jnp.where(jnp.eye(tile, dtype=bool), -jnp.inf, tile_scores(a_TD, a_TD, metric))
        scores_TT = _between_groups(scores_TT, mask, mask)
        by_row = _remember((never, never), scores_TT, mask.valid_V, here, tiling, axis=1)
        by_row, by_column = jax.lax.fori_loop(
            1, blocks // 2 + 1, lambda step, met: meet(met, here, step), (by_row, by_column)
        )
        return by_column, _candidates(by_row, count, tiling)

    nothing = jnp.full((blocks, groups, tile), NEGATIVE_INFINITY)
    by_column, of_rows = jax.lax.scan(walk, (nothing, nothing), first + jnp.arange(own, dtype=jnp.int32))
    of_columns = jax.lax.map(lambda best: _candidates((best[0].T, best[1].T), count, tiling), by_column)
    flat = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    return flat(of_rows), flat(of_columns)


def merge(parts: list[Candidates], tiling: Tiling) -> Candidates:
    """As many of several lists for the same rows as one of them holds, the best ones."""
    scores_RC = jnp.concatenate([part.scores_RC for part in parts], axis=1)
    ids_RC = jnp.concatenate([part.ids_RC for part in parts], axis=1)
    # The least of what is kept bounds what is not. (No slice of a top_k: on CPU, XLA makes a sort of one.)
    top_RC, place_RC = jax.lax.top_k(scores_RC, parts[0].ids_RC.shape[1])
    dropped_R = unordered(ordered(jnp.min(top_RC, axis=1)) | jnp.int32(tiling.low_bits))
    rest_bound_R = functools.reduce(jnp.maximum, [part.rest_bound_R for part in parts], dropped_R)
    return Candidates(top_RC, jnp.take_along_axis(ids_RC, place_RC, axis=1), rest_bound_R)


def _between_groups(scores_TT: jax.Array, a: Eligible, b: Eligible) -> jax.Array:
    """-inf where two rows are of one group: neither serves the other, nor counts in its bound."""
    if a.group_V is None:
        return scores_TT
    return jnp.where(a.group_V[:, None] != b.group_V[None, :], scores_TT, -jnp.inf)


def _remember(
    best: Best, scores_TT: jax.Array, valid_T: jax.Array, block: jax.Array, tiling: Tiling, *, axis: int
) -> Best:
    """Takes the scores along `axis`, those of the rows of `block`, into the memory of the other axis."""
    kept, lost = best
    members = tiling.tile // tiling.groups
    low = jnp.int32(tiling.low_bits)
    for member in range(members):
        part = functools.partial(
            jax.lax.slice_in_dim, start_index=member * tiling.groups, limit_index=(member + 1) * tiling.groups
        )
        packed = (ordered(part(scores_TT, axis=axis)) & ~low) | (block * members + member).astype(jnp.int32)
        allowed = jnp.expand_dims(part(valid_T, axis=0), 1 - axis)
        packed = jnp.maximum(packed, NEGATIVE_INFINITY)  # which itself, packed, would sink below
        packed = jnp.where(allowed, packed, NEGATIVE_INFINITY)
        lost = jnp.maximum(lost, jnp.minimum(kept, packed))
        kept = jnp.maximum(kept, packed)
    return kept, lost


def _candidates(best_RG: Best, count: int, tiling: Tiling) -> Candidates:
    """The best `count` of what rows remember; there are at least as many groups."""
    kept_RG, lost_RG = best_RG
    # Back to floats: of those every backend has a fast top_k and a fast maximum of a row.
    top_RC, group_RC = jax.lax.top_k(unordered(kept_RG), count)
    packed_RC = ordered(top_RC)
    low = jnp.int32(tiling.low_bits)
    ids_RC = jnp.where(jnp.isneginf(top_RC), 0, (packed_RC & low) * tiling.groups + group_RC)
    rest_bound_R = jnp.maximum(jnp.max(unordered(lost_RG), axis=1), jnp.min(top_RC, axis=1))
    return Candidates(top_RC, ids_RC.astype(jnp.int32), unordered(ordered(rest_bound_R) | low))
