"""The neighbour table: for each row of an embedding matrix, its nearest other rows.

Owns how all rows are searched from nothing. Must not know: tokenizers (which rows may be neighbours arrives
as masks), mixtures, which of a model's matrices it is given, or that the matrix may change.

Tiles give candidates, search.py ranks and certifies them, and the few anchors without a certificate (whose
nearest rows are too close to one another for rounded scores) are searched by brute force. So the table is the
exact one, up to the order of scores that differ by less than rounding.

Letter of this file: A anchors of one device.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ngrpo_jax.algo.neighbors import search, tiles
from ngrpo_jax.algo.neighbors.devices import AXIS, divided, parts_of, replicate, replicated
from ngrpo_jax.algo.neighbors.eligibility import Eligible, eligible_rows
from ngrpo_jax.algo.neighbors.nearness import METRICS
from ngrpo_jax.algo.neighbors.search import Candidates, Ranked

# Candidates beyond the wanted neighbours. Tokens that were hardly trained have nearly equal rows, about
# twenty of them in real models: with fewer candidates their anchors would have no gap to be certified by.
SPARE = 17
TILE = 2048  # rows of a tile: the products run at full speed and two tiles fit into a cache of 32 MiB


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """How a table is built and refreshed.

    Attributes:
      k: entries of a table's row, the row itself included.
      metric: one of METRICS.
      mesh: over all of whose devices the rows are divided; None: no division.
      spare: candidates of a row beyond the neighbours that the table needs.
      tile: rows of a tile, at most.
    """

    k: int
    metric: str = "cosine"
    mesh: Mesh | None = None
    spare: int = SPARE
    tile: int = TILE

    @property
    def neighbors(self) -> int:
        """How many candidates of a row have to be its nearest, in order."""
        return max(1, self.k - 1)

    def candidates(self, size: int) -> int:
        """C: candidates of a row of a matrix of `size` rows."""
        return min(self.neighbors + self.spare, size)

    def uses_tiles(self, size: int) -> bool:
        """Whether all rows are searched by tiles, at half of the products; a small matrix by brute force."""
        return size >= 4 * self.tile and self.candidates(size) <= self.tile // 4

    @property
    def brute_force_batch(self) -> int:
        """How many anchors are compared with all rows at once."""
        return max(1, self.tile // 32)


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
    build = compiled(nearest, TableConfig(k, metric, mesh, tile=tile))
    return as_table(build(jnp.asarray(embedding_VD), eligible).ids_AC, k)


@functools.partial(jax.jit, static_argnames="k")
def as_table(ids_VC: jax.Array, k: int) -> jax.Array:
    """int32 [V, k]: each row itself, then its first k-1 candidates."""
    own_V1 = jnp.arange(ids_VC.shape[0], dtype=jnp.int32)[:, None]
    return jnp.concatenate([own_V1, ids_VC[:, : k - 1]], axis=1)


@functools.cache
def compiled(work: Callable, config: TableConfig) -> Callable:
    """`work(..., config=config)` compiled, its results whole on every device.

    One sharding for all results, so that a state with another one compiles no program again.
    """
    return jax.jit(functools.partial(work, config=config), out_shardings=replicated(config.mesh))


def nearest(embedding_VD: jax.Array, eligible: Eligible, config: TableConfig) -> Ranked:
    """Ranked candidates of every row, the first `config.neighbors` its nearest. Within a compiled program."""
    size = embedding_VD.shape[0]
    work = _by_tiles if config.uses_tiles(size) else _by_brute_force
    embedding_VD, eligible = replicate((embedding_VD, eligible), config.mesh)
    ranked = divided(functools.partial(work, config=config), config.mesh)(embedding_VD, eligible)
    return replicate(jax.tree.map(lambda x: x[:size], ranked), config.mesh)


def _by_brute_force(
    part: jax.Array, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig
) -> Ranked:
    """A device's anchors, each compared with all rows."""
    index = search.make_index(embedding_VD, eligible, config.metric)
    anchors, count = -(-embedding_VD.shape[0] // parts_of(config.mesh)), config.candidates(index.size)
    empty = Ranked(jnp.zeros((anchors, count), jnp.int32), jnp.zeros((anchors, count)), jnp.zeros(anchors))
    every_A = jnp.ones(anchors, bool)
    return search.brute_force_selected(index, part * anchors, every_A, empty, config.brute_force_batch)


def _by_tiles(part: jax.Array, embedding_VD: jax.Array, eligible: Eligible, config: TableConfig) -> Ranked:
    """A device's anchors: candidates by tiles, ranked, and brute force where there is no certificate."""
    index = search.make_index(embedding_VD, eligible, config.metric)
    parts, count = parts_of(config.mesh), config.candidates(index.size)
    tiling = tiles.make_tiling(index.size, config.tile, parts)
    blocks = tiling.blocks // parts
    of_rows, of_columns = tiles.find_candidates(index, tiling, count, part * blocks, blocks)
    candidates = tiles.merge([of_rows, *_exchange(of_columns, parts)], tiling)

    anchors = blocks * tiling.tile
    ids_A = part * anchors + jnp.arange(anchors, dtype=jnp.int32)
    ranked = _rerank_in_batches(index, ids_A, candidates, tiling.tile)
    uncertain_A = ~search.is_certified(index, ids_A, ranked, config.neighbors) & (ids_A < index.size)
    return search.brute_force_selected(index, part * anchors, uncertain_A, ranked, max(1, tiling.tile // 32))


def _exchange(candidates: Candidates, parts: int) -> list[Candidates]:
    """Candidates of all rows, from this device's tiles -> those of this device's rows, from each device."""
    if parts == 1:
        return [candidates]
    received = jax.tree.map(
        lambda x: jax.lax.all_to_all(x.reshape(parts, -1, *x.shape[1:]), AXIS, 0, 0), candidates
    )
    return [jax.tree.map(lambda x, i=i: x[i], received) for i in range(parts)]


def _rerank_in_batches(
    index: search.SearchIndex, ids_A: jax.Array, candidates: Candidates, tile: int
) -> Ranked:
    """`search.rerank` in batches that fit into a cache and divide a tile."""
    most = search.rank_batch(candidates.ids_AC.shape[1], index.width)
    batch = max(b for b in range(1, tile + 1) if tile % b == 0 and b <= most)
    batches = jax.tree.map(lambda x: x.reshape(-1, batch, *x.shape[1:]), (ids_A, candidates))
    ranked = jax.lax.map(lambda batch: search.rerank(index, *batch), batches)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), ranked)
