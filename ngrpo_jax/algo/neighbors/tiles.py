"""Candidates for the neighbours of every row from half of the score matrix, a tile at a time.

Owns the loop over tiles and what rows remember of them. Must not know how candidates are ranked: it returns,
for each row, a few of the largest rounded scores and a bound on the scores of all other eligible rows.

All four metrics are symmetric, so the tile of blocks i and j serves the rows of both, and each pair of blocks
is computed once. Every row has U memories; memory u stands for the columns c with c mod U = u:

                   columns of block j
                 0   1  ...  U-1  U   U+1 ...              memories of one row of block i
               ┌──────────────────────────────┐
    a row of   │ s₀  s₁ ...  ..  s_U  ..  ... │ ──►  u           0                1         ...  U-1
    block i    │                              │      best  max(s₀,s_U,..)  max(s₁,s_U+1,..) ...
               └──────────────────────────────┘      lost  largest score that `best` has dropped
                   │ the same, by columns
                   ▼
                memories of the rows of block j

A score is held as an integer of the same order (bits.py) whose low bits number the column within its memory.
So a tile costs two maxima of integers a score, whatever k is. Neither packing nor dropping costs exactness,
because the bound covers both. Memory: 2U integers a row, and one tile.

Letters of this file: E rows of a block (one edge of a tile), U memories of a row, A rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.bits import NEGATIVE_INFINITY, ordered, unordered
from ngrpo_jax.algo.neighbors.eligibility import Eligible
from ngrpo_jax.algo.neighbors.nearness import tile_scores
from ngrpo_jax.algo.neighbors.search import Candidates, SearchIndex


class Tiling(NamedTuple):
    """How the rows are cut into blocks; the last rows may be padding."""

    blocks: int
    tile: int  # E, rows of a block
    memories: int  # U, which divides E

    @property
    def rows(self) -> int:
        """V with the padding."""
        return self.blocks * self.tile

    @property
    def low_bits(self) -> int:
        """Mask of the bits of a packed score that number the columns of one memory."""
        return (1 << (self.rows // self.memories - 1).bit_length()) - 1


class Memories(NamedTuple):
    """Of each memory the largest packed score, and the largest one that was dropped for it.

    int32 [E, U] for the rows of a block, [U, E] for its columns.
    """

    best: jax.Array
    lost: jax.Array


def make_tiling(size: int, tile: int, devices: int) -> Tiling:
    """Tiles of at most `tile` rows, as many blocks for every device, and as little padding as that leaves."""
    memories = max(1, tile // 4)
    blocks = devices * -(-size // (tile * devices))
    return Tiling(blocks, memories * -(-size // (blocks * memories)), memories)


def find_candidates(
    index: SearchIndex, tiling: Tiling, count: int, first: jax.Array, own: int
) -> tuple[Candidates, Candidates]:
    """`count` candidates from the tiles whose row block is one of the `own` blocks from `first` on.

    Row block i meets itself and the blocks after it, half way round the ring of blocks: so all blocks have
    the same work, and can be divided over devices.

    Returns:
      Candidates of the own blocks' rows among the columns that they met, and of all rows (with padding) as
      columns among the own blocks' rows.
    """
    blocks, tile, memories = tiling
    padding = tiling.rows - index.size
    rows_VD = jnp.pad(index.rows_VD, ((0, padding), (0, 0)))
    eligible = jax.tree.map(lambda x: jnp.pad(x, (0, padding)), index.eligible)  # padding is not valid

    def block_of(x: Any, number: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * tile, tile), x)

    def meet(
        met: tuple[Memories, Memories], here: jax.Array, distance: jax.Array
    ) -> tuple[Memories, Memories]:
        """The tile of the row block `here` and the column block that is `distance` further round the ring."""
        there = (here + distance) % blocks
        by_row, by_column = met
        column = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, there, keepdims=False), by_column)

        # All slices come in as operands: sliced in here, they would keep XLA from vectorising the loops
        # below.
        def work(by_row, column, rows, masks):
            scores_EE = _apart(tile_scores(rows[0], rows[1], index.metric), *masks)
            by_row = _remember(by_row, scores_EE, masks[1].valid_V, there, tiling, axis=1)
            return by_row, _remember(column, scores_EE, masks[0].valid_V, here, tiling, axis=0)

        # With an even number of blocks, two blocks half a ring apart meet from both ends; one of them does
        # it.
        low_works = jnp.minimum(here, there) % 2 == 0
        wanted = (2 * distance != blocks) | ((here < there) == low_works)
        pairs = [(block_of(x, here), block_of(x, there)) for x in (rows_VD, eligible)]
        by_row, column = jax.lax.cond(wanted, work, lambda *given: given[:2], by_row, column, *pairs)
        by_column = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, there, 0), by_column, column
        )
        return by_row, by_column

    def walk(by_column: Memories, here: jax.Array) -> tuple[Memories, Candidates]:
        """All tiles of one row block, the first of which is the block with itself."""
        rows_ED, mask = block_of((rows_VD, eligible), here)
        scores_EE = jnp.where(
            jnp.eye(tile, dtype=bool), -jnp.inf, tile_scores(rows_ED, rows_ED, index.metric)
        )
        scores_EE = _apart(scores_EE, mask, mask)
        by_row = _remember(_empty((tile, memories)), scores_EE, mask.valid_V, here, tiling, axis=1)
        by_row, by_column = jax.lax.fori_loop(
            1, blocks // 2 + 1, lambda distance, met: meet(met, here, distance), (by_row, by_column)
        )
        return by_column, _candidates(by_row, count, tiling)

    by_column, of_rows = jax.lax.scan(
        walk, _empty((blocks, memories, tile)), first + jnp.arange(own, dtype=jnp.int32)
    )
    of_columns = jax.lax.map(
        lambda memory: _candidates(jax.tree.map(jnp.transpose, memory), count, tiling), by_column
    )
    flat = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    return flat(of_rows), flat(of_columns)


def merge(lists: list[Candidates], tiling: Tiling) -> Candidates:
    """The best of several lists of candidates for the same rows, as many as one of the lists holds."""
    scores_AC = jnp.concatenate([each.scores_AC for each in lists], axis=1)
    ids_AC = jnp.concatenate([each.ids_AC for each in lists], axis=1)
    # The least of what is kept bounds what is not. (No slice of a top_k: on CPU, XLA makes a sort of one.)
    top_AC, place_AC = jax.lax.top_k(scores_AC, lists[0].ids_AC.shape[1])
    dropped_A = unordered(ordered(jnp.min(top_AC, axis=1)) | jnp.int32(tiling.low_bits))
    rest_bound_A = functools.reduce(jnp.maximum, [each.rest_bound_A for each in lists], dropped_A)
    return Candidates(top_AC, jnp.take_along_axis(ids_AC, place_AC, axis=1), rest_bound_A)


def _empty(shape: tuple[int, ...]) -> Memories:
    never = jnp.full(shape, NEGATIVE_INFINITY)
    return Memories(never, never)


def _apart(scores_EE: jax.Array, rows: Eligible, columns: Eligible) -> jax.Array:
    """-inf where two rows are of one group: neither is a candidate of the other, nor counts in its bound."""
    if rows.group_V is None:
        return scores_EE
    return jnp.where(rows.group_V[:, None] != columns.group_V[None, :], scores_EE, -jnp.inf)


def _remember(
    memories: Memories,
    scores_EE: jax.Array,
    valid_E: jax.Array,
    block: jax.Array,
    tiling: Tiling,
    *,
    axis: int,
) -> Memories:
    """Takes the scores along `axis`, those of the rows of `block`, into the memories of the other axis."""
    best, lost = memories
    members = tiling.tile // tiling.memories
    low = jnp.int32(tiling.low_bits)
    for member in range(members):
        part = functools.partial(
            jax.lax.slice_in_dim,
            start_index=member * tiling.memories,
            limit_index=(member + 1) * tiling.memories,
        )
        packed = (ordered(part(scores_EE, axis=axis)) & ~low) | (block * members + member).astype(jnp.int32)
        allowed = jnp.expand_dims(part(valid_E, axis=0), 1 - axis)
        packed = jnp.maximum(packed, NEGATIVE_INFINITY)  # packed, -inf itself would fall below this
        packed = jnp.where(allowed, packed, NEGATIVE_INFINITY)
        lost = jnp.maximum(lost, jnp.minimum(best, packed))
        best = jnp.maximum(best, packed)
    return Memories(best, lost)


def _candidates(memories_AU: Memories, count: int, tiling: Tiling) -> Candidates:
    """The `count` largest of what each row remembers; a row has at least as many memories."""
    # Back to floats: for these every backend has a fast top_k and a fast maximum of a row.
    top_AC, memory_AC = jax.lax.top_k(unordered(memories_AU.best), count)
    low = jnp.int32(tiling.low_bits)
    ids_AC = (ordered(top_AC) & low) * tiling.memories + memory_AC
    ids_AC = jnp.where(jnp.isneginf(top_AC), 0, ids_AC).astype(jnp.int32)
    rest_A = jnp.maximum(jnp.max(unordered(memories_AU.lost), axis=1), jnp.min(top_AC, axis=1))
    return Candidates(top_AC, ids_AC, unordered(ordered(rest_A) | low))
