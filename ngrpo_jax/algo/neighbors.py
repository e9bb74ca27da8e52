"""The neighbour table: for each row of an embedding matrix, its nearest other rows.

Owns: what "near" means, and finding it in memory O(block · V). Must not know: tokenizers (which rows may
be neighbours arrives as a mask), mixtures, or which of a model's matrices it is given.

Exactness. A matrix product rounds differently from one tile to the next, so it only nominates: the few
best of each row are scored again from their rows by one formula and then ordered by (score, lower id).
Rows with the same bits share one nomination score, so that ties among them go to the lower id however
many there are.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

METRICS = ("cosine", "l2", "l1", "dot")

# Nominated beyond the wanted ones, so that rounding at the boundary of the nominations drops no neighbour.
_SPARE = 4
# Dimensions that one pass over an L1 block adds: enough to be bound by arithmetic rather than by memory.
_L1_WIDTH = 16


def neighbor_table(
    embedding_VD: jax.Array | np.ndarray,
    k: int,
    *,
    metric: str = "cosine",
    valid_V: jax.Array | np.ndarray | None = None,
    group_V: jax.Array | np.ndarray | None = None,
    block: int = 512,
) -> jax.Array:
    """The candidates of every row as an anchor, (7) of arXiv 2606.10768: int32 [V, k].

    Column 0 is the row itself, columns 1.. its k-1 nearest other valid rows, nearest first, of equally
    near ones the lower id first. `metric`: "cosine" (8), where a zero row has cosine 0 to every row, "l2",
    "l1" or "dot". `valid_V` bool [V] (default: all) says which rows may be neighbours; a row that may not
    still has its own k-1 neighbours. `group_V` int32 [V]: rows whose group equals the anchor's are never its
    neighbours (the row itself stays column 0). `embedding_VD` of any float dtype is compared in float32,
    `block` rows at a time: memory is O(block · V).

    Raises ValueError for an unknown metric, a k below 1 or above the number of valid rows (of other groups,
    where there are groups), and for arguments that are not [V, D] and [V].
    """
    if np.ndim(embedding_VD) != 2 or not np.size(embedding_VD):
        raise ValueError(
            f"embedding_VD must be a matrix [V, D], not an array of shape {np.shape(embedding_VD)}"
        )
    size = embedding_VD.shape[0]
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown: use one of {', '.join(METRICS)}")
    if valid_V is None:
        valid_V = np.ones(size, bool)
    if np.shape(valid_V) != (size,):
        raise ValueError(f"valid_V must have shape ({size},), one entry a row, not {np.shape(valid_V)}")
    usable = int(np.sum(valid_V))
    if not 1 <= k <= usable:
        raise ValueError(f"k is {k}, but must be at least 1 and at most the number of valid rows, {usable}")
    if group_V is not None:
        _check_groups(np.asarray(group_V), np.asarray(valid_V, bool), k)
        group_V = jnp.asarray(group_V, jnp.int32)
    if k == 1:
        return jnp.arange(size, dtype=jnp.int32)[:, None]
    rows_VD = jnp.asarray(embedding_VD).astype(jnp.float32)
    return _table(rows_VD, jnp.asarray(valid_V, bool), k, metric, max(1, min(block, size)), group_V)


def _check_groups(group_V: np.ndarray, valid_V: np.ndarray, k: int) -> None:
    """Refuses groups after which some anchor has fewer than k - 1 rows left to be its neighbours."""
    if group_V.shape != valid_V.shape:
        raise ValueError(f"group_V must have shape {valid_V.shape}, one entry a row, not {group_V.shape}")
    _, place_V = np.unique(group_V, return_inverse=True)
    left = int(valid_V.sum() - np.bincount(place_V, weights=valid_V).max())
    if left < k - 1:
        raise ValueError(
            f"k is {k}, but the largest group of group_V leaves its rows only {left} valid rows of others"
        )


@functools.partial(jax.jit, static_argnames=("k", "metric", "block"))
def _table(
    rows_VD: jax.Array,
    valid_V: jax.Array,
    k: int,
    metric: str,
    block: int,
    group_V: jax.Array | None = None,
) -> jax.Array:
    size = rows_VD.shape[0]
    first_V = _first_identical(rows_VD)
    if metric == "cosine":
        rows_VD = _unit_rows(rows_VD)
    blocks = -(-size // block)
    ids_NR = jnp.minimum(jnp.arange(blocks * block, dtype=jnp.int32), size - 1).reshape(blocks, block)
    nearest = functools.partial(_nearest, rows_VD, valid_V, group_V, first_V, k=k, metric=metric)
    return jax.lax.map(nearest, ids_NR).reshape(blocks * block, k)[:size]


def _nearest(
    rows_VD: jax.Array,
    valid_V: jax.Array,
    group_V: jax.Array | None,
    first_V: jax.Array,
    ids_R: jax.Array,
    *,
    k: int,
    metric: str,
) -> jax.Array:
    """The table's rows for the anchors `ids_R`: int32 [R, k]."""
    count, size = ids_R.shape[0], rows_VD.shape[0]
    queries_RD = rows_VD[ids_R]
    scores_RV = _block_scores(queries_RD, rows_VD, metric)
    chex.assert_shape(scores_RV, (count, size))
    has_twins = jnp.any(first_V != jnp.arange(size, dtype=jnp.int32))
    scores_RV = jax.lax.cond(has_twins, lambda s: jnp.take(s, first_V, axis=1), lambda s: s, scores_RV)
    allowed_RV = valid_V[None, :] & (jnp.arange(size, dtype=jnp.int32)[None, :] != ids_R[:, None])
    if group_V is not None:
        allowed_RV = allowed_RV & (group_V[None, :] != group_V[ids_R][:, None])
    scores_RV = jnp.where(allowed_RV, scores_RV, -jnp.inf)

    top_RC, found_RC = jax.lax.top_k(scores_RV, min(k - 1 + _SPARE, size))
    exact_RC = _pair_scores(queries_RD[:, None, :], rows_VD[found_RC], metric)
    exact_RC = jnp.where(jnp.isneginf(top_RC), -jnp.inf, exact_RC)  # nominated only for want of others
    _, ordered_RC = jax.lax.sort((-exact_RC, found_RC.astype(jnp.int32)), dimension=1, num_keys=2)
    return jnp.concatenate([ids_R[:, None], ordered_RC[:, : k - 1]], axis=1)


def _block_scores(queries_RD: jax.Array, rows_VD: jax.Array, metric: str) -> jax.Array:
    """Nearness of every query to every row, larger is nearer, up to a constant of the query: [R, V]."""
    if metric == "l1":
        return -_l1_distances(queries_RD, rows_VD)
    products_RV = jax.lax.dot_general(
        queries_RD, rows_VD, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    if metric == "l2":  # -|q - e|² = 2 q·e - |e|² - |q|²
        return 2.0 * products_RV - jnp.sum(jnp.square(rows_VD), axis=1)[None, :]
    return products_RV


def _l1_distances(queries_RD: jax.Array, rows_VD: jax.Array) -> jax.Array:
    """Σ_d |q_d - e_d| [R, V], a few dimensions a pass: no [R, V, D], which no matrix product can avoid."""
    pad = -queries_RD.shape[1] % _L1_WIDTH
    by_width = [
        jnp.pad(x, ((0, 0), (0, pad))).T.reshape(-1, _L1_WIDTH, x.shape[0]) for x in (queries_RD, rows_VD)
    ]

    def add(total_RV: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        queries_WR, rows_WV = parts
        for d in range(_L1_WIDTH):
            total_RV = total_RV + jnp.abs(queries_WR[d][:, None] - rows_WV[d][None, :])
        return total_RV, None

    zeros_RV = jnp.zeros((queries_RD.shape[0], rows_VD.shape[0]), jnp.float32)
    return jax.lax.scan(add, zeros_RV, tuple(by_width))[0]


def _pair_scores(a: jax.Array, b: jax.Array, metric: str) -> jax.Array:
    """Nearness of vectors along the last axis, larger is nearer: equal vectors get equal scores."""
    a = jnp.broadcast_to(a, b.shape)
    if metric == "l1":
        return -jnp.sum(jnp.abs(a - b), axis=-1)
    if metric == "l2":
        return -jnp.sum(jnp.square(a - b), axis=-1)
    return jnp.sum(a * b, axis=-1)


def _unit_rows(rows_VD: jax.Array) -> jax.Array:
    """Rows of length 1; a zero row stays zero. The largest entry goes first, lest tiny squares vanish."""
    largest_V1 = jnp.max(jnp.abs(rows_VD), axis=1, keepdims=True)
    scaled_VD = rows_VD / jnp.where(largest_V1 > 0, largest_V1, 1.0)
    norm_V1 = jnp.linalg.norm(scaled_VD, axis=1, keepdims=True)
    return scaled_VD / jnp.where(norm_V1 > 0, norm_V1, 1.0)


def _first_identical(rows_VD: jax.Array) -> jax.Array:
    """int32 [V]: the lowest id of the rows with the same bits, the row's own where it has no twin.

    Rows are compared by two 32-bit hashes. Integer sums do not depend on their order, so twins always
    meet; that two different rows meet has a chance of V² / 2^65, about 1e-9 for V = 152k.
    """
    size, width = rows_VD.shape
    bits_VD = jax.lax.bitcast_convert_type(rows_VD, jnp.uint32)
    ids_V = jnp.arange(size, dtype=jnp.int32)
    hashes = [
        jnp.sum(_scramble(bits_VD, width, salt), axis=1, dtype=jnp.uint32)
        for salt in (0x9E3779B9, 0x7F4A7C15)
    ]
    first, second, order_V = jax.lax.sort((*hashes, ids_V), num_keys=3)
    differs_V = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    starts_V = jnp.concatenate([jnp.ones(1, bool), differs_V])
    start_of_run_V = jax.lax.cummax(jnp.where(starts_V, ids_V, 0))
    return jnp.zeros(size, jnp.int32).at[order_V].set(order_V[start_of_run_V])


def _scramble(bits_VD: jax.Array, width: int, salt: int) -> jax.Array:
    """A murmur-style finaliser of each entry with its column, so that sums of them tell rows apart."""
    columns_1D = (jnp.arange(1, width + 1, dtype=jnp.uint32) * jnp.uint32(salt))[None, :]
    x = bits_VD ^ columns_1D
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
