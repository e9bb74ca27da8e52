"""What "near" means: scores of row pairs, and how far float32 may take them from the truth.

Owns the four metrics, in two forms each: scores of a whole tile of pairs, which a matrix product gives and
which only nominate, and scores of single pairs, which decide. Larger is nearer in both. Must not know which
pairs anybody wants, nor how many.

Closeness is the real number that a metric orders by: the cosine, the product, or the negative distance. Every
bound here holds for it and not for a rounded stand-in: u = 2^-24 is the rounding unit, a sum of D products in
any order is off by at most D·u times the sum of their absolute values, and |Σ a_d b_d| ≤ |a||b|.
docs/method.md derives them.

Letters of this file: R and W rows, on the two sides of a tile; K dimensions of a pass.
"""

import chex
import jax
import jax.numpy as jnp

METRICS = ("cosine", "l2", "l1", "dot")

UNIT = 2.0**-24
# Dimensions that one pass over an L1 tile adds: enough to be bound by arithmetic rather than by memory.
_L1_WIDTH = 16


def comparable_rows(embedding_VD: jax.Array, metric: str) -> jax.Array:
    """The float32 rows that the other functions take: of length 1 for the cosine (a zero row stays zero)."""
    rows_VD = embedding_VD.astype(jnp.float32)
    return _unit_rows(rows_VD) if metric == "cosine" else rows_VD


def lengths(rows_VD: jax.Array, metric: str) -> jax.Array:
    """The norm that bounds a row's scores, float32 [V]: the sum of absolute entries for l1, else Euclid's."""
    if metric == "l1":
        return jnp.sum(jnp.abs(rows_VD), axis=1)
    largest_V = jnp.max(jnp.abs(rows_VD), axis=1)  # taken out first, lest tiny squares vanish
    scale_V = jnp.where(largest_V > 0, largest_V, 1.0)
    return scale_V * jnp.sqrt(jnp.sum(jnp.square(rows_VD / scale_V[:, None]), axis=1))


def tile_scores(a_RD: jax.Array, b_WD: jax.Array, metric: str) -> jax.Array:
    """Scores of every row of `a` with every row of `b`, float32 [R, W]; l2 squared."""
    chex.assert_equal_shape_suffix([a_RD, b_WD], 1)
    if metric == "l1":
        return -_l1_distances(a_RD, b_WD)
    products_RW = jax.lax.dot_general(
        a_RD, b_WD, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    if metric == "l2":  # -|a - b|² = 2 a·b - |a|² - |b|²
        squares = [jnp.sum(jnp.square(x), axis=1) for x in (a_RD, b_WD)]
        return 2.0 * products_RW - (squares[0][:, None] + squares[1][None, :])
    return products_RW


def pair_scores(a: jax.Array, b: jax.Array, metric: str) -> jax.Array:
    """Scores of vectors along the last axis, l2 squared: equal vectors get equal scores."""
    a = jnp.broadcast_to(a, b.shape)
    if metric == "l1":
        return -jnp.sum(jnp.abs(a - b), axis=-1)
    if metric == "l2":
        return -jnp.sum(jnp.square(a - b), axis=-1)
    return jnp.sum(a * b, axis=-1)


def tile_error(length_R: jax.Array, longest: jax.Array, width: int, metric: str) -> jax.Array:
    """How far a tile's scores of rows of these lengths may be from the truth, float32 [R].

    `longest` bounds the other row's length. Units are those of the scores (l2: squares).
    """
    relative = (2 * width + 16) * UNIT  # with the rounding of the lengths, and of unit rows, in it
    if metric == "cosine":
        size_R = jnp.ones_like(length_R)
    elif metric == "dot":
        size_R = length_R * longest
    else:
        size_R = jnp.square(length_R + longest) if metric == "l2" else length_R + longest
    return relative * size_R + width * jnp.finfo(jnp.float32).tiny


def closeness_above(score_R: jax.Array, error_R: jax.Array, metric: str) -> jax.Array:
    """An upper bound of the closeness of pairs whose tile score is at most `score_R`."""
    upper_R = score_R + error_R + 2 * UNIT * jnp.abs(score_R)
    if metric == "l2":
        distance_R = jnp.sqrt(jnp.maximum(-upper_R, 0.0)) * (1 - 4 * UNIT)
        return jnp.where(jnp.isneginf(score_R), -jnp.inf, -distance_R)
    return jnp.where(jnp.isneginf(score_R), -jnp.inf, upper_R)


def pair_closeness(scores: jax.Array, length_R: jax.Array, longest: jax.Array, width: int, metric: str):
    """(closeness, its error) of pair scores [R, ...] of rows of these lengths, both [R, ...].

    Differences are taken before they are squared or summed, so for distances the error is relative.
    """
    relative = (2 * width + 16) * UNIT
    if metric in ("cosine", "dot"):
        error_R = tile_error(length_R, longest, width, metric)
        error_R = error_R.reshape(error_R.shape + (1,) * (scores.ndim - 1))
        return scores, jnp.broadcast_to(error_R, scores.shape)
    closeness = -jnp.sqrt(-scores) if metric == "l2" else scores
    return closeness, relative * jnp.abs(closeness) + width * jnp.finfo(jnp.float32).tiny


def _l1_distances(a_RD: jax.Array, b_WD: jax.Array) -> jax.Array:
    """Σ_d |a_d - b_d| [R, W], a few dimensions a pass: no [R, W, D], which no matrix product can avoid."""
    pad = -a_RD.shape[1] % _L1_WIDTH
    by_width = [jnp.pad(x, ((0, 0), (0, pad))).T.reshape(-1, _L1_WIDTH, x.shape[0]) for x in (a_RD, b_WD)]

    def add(total_RW: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        a_KR, b_KW = parts
        for d in range(_L1_WIDTH):
            total_RW = total_RW + jnp.abs(a_KR[d][:, None] - b_KW[d][None, :])
        return total_RW, None

    zeros_RW = jnp.zeros((a_RD.shape[0], b_WD.shape[0]), jnp.float32)
    return jax.lax.scan(add, zeros_RW, tuple(by_width))[0]


def _unit_rows(rows_VD: jax.Array) -> jax.Array:
    """Rows of length 1; a zero row stays zero. The largest entry goes first, lest tiny squares vanish."""
    largest_V1 = jnp.max(jnp.abs(rows_VD), axis=1, keepdims=True)
    scaled_VD = rows_VD / jnp.where(largest_V1 > 0, largest_V1, 1.0)
    norm_V1 = jnp.linalg.norm(scaled_VD, axis=1, keepdims=True)
    return scaled_VD / jnp.where(norm_V1 > 0, norm_V1, 1.0)


def first_identical(rows_VD: jax.Array) -> jax.Array:
    """int32 [V]: the lowest id of the rows with the same bits, the row's own where it has no twin.

    Rows are compared by two 32-bit hashes. Integer sums do not depend on their order, so twins always
    meet; that two different rows meet has a chance of V² / 2^65, about 1e-9 for V = 152k.
    """
    ids_V = jnp.arange(rows_VD.shape[0], dtype=jnp.int32)
    hashes = [row_hash(rows_VD, salt) for salt in (0x9E3779B9, 0x7F4A7C15)]
    first, second, order_V = jax.lax.sort((*hashes, ids_V), num_keys=3)
    differs_V = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    starts_V = jnp.concatenate([jnp.ones(1, bool), differs_V])
    start_of_run_V = jax.lax.cummax(jnp.where(starts_V, ids_V, 0))
    return jnp.zeros_like(ids_V).at[order_V].set(order_V[start_of_run_V])


def row_hash(rows_VD: jax.Array, salt: int) -> jax.Array:
    """uint32 [V]: a murmur-style finaliser of each float32 entry with its column, summed over the row."""
    columns_1D = (jnp.arange(1, rows_VD.shape[1] + 1, dtype=jnp.uint32) * jnp.uint32(salt))[None, :]
    x = jax.lax.bitcast_convert_type(rows_VD, jnp.uint32) ^ columns_1D
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(x ^ (x >> 16), axis=1, dtype=jnp.uint32)
