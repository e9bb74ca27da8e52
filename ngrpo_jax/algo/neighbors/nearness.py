"""The metrics: scores of pairs of rows, how far float32 may take them from the truth, how far an update may.

Owns everything that depends on the metric. Must not know which pairs are wanted, nor how many.

Each metric has two forms of scores, larger for nearer rows in both: those of a whole tile of pairs, which a
matrix product gives and which only select candidates, and those of single pairs, which decide their order.

Closeness is the real number that a metric orders by: the cosine, the dot product, or the negative distance.
Every bound here holds for it, not for its rounded value: u = 2^-24 is the rounding unit, a sum of D products
in any order is off by at most D·u times the sum of their absolute values, and |Σ a_d b_d| ≤ |a||b|.
docs/method.md derives the bounds.

Letters of this file: A and W rows, on the two sides of a tile; X dimensions of one pass.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

METRICS = ("cosine", "l2", "l1", "dot")

UNIT = 2.0**-24
# Dimensions that one pass over an L1 tile adds: enough to be bound by arithmetic rather than by memory.
_L1_WIDTH = 16


def comparable_rows(embedding_VD: jax.Array, metric: str) -> jax.Array:
    """The float32 rows that the other functions take: of length 1 for the cosine (a zero row stays zero)."""
    rows_VD = embedding_VD.astype(jnp.float32)
    return _unit_rows(rows_VD) if metric == "cosine" else rows_VD


def norms(rows_VD: jax.Array, metric: str) -> jax.Array:
    """The norm that bounds a row's scores, float32 [V]: the sum of absolute entries for l1, else Euclid's."""
    if metric == "l1":
        return jnp.sum(jnp.abs(rows_VD), axis=1)
    largest_V = jnp.max(jnp.abs(rows_VD), axis=1)  # taken out first: squares of tiny entries are 0
    scale_V = jnp.where(largest_V > 0, largest_V, 1.0)
    return scale_V * jnp.sqrt(jnp.sum(jnp.square(rows_VD / scale_V[:, None]), axis=1))


def tile_scores(a_AD: jax.Array, b_WD: jax.Array, metric: str) -> jax.Array:
    """Scores of every row of `a` with every row of `b`, float32 [A, W]; l2 squared."""
    chex.assert_equal_shape_suffix([a_AD, b_WD], 1)
    if metric == "l1":
        return -_l1_distances(a_AD, b_WD)
    products_AW = jax.lax.dot_general(
        a_AD, b_WD, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    if metric == "l2":  # -|a - b|² = 2 a·b - |a|² - |b|²
        squares = [jnp.sum(jnp.square(x), axis=1) for x in (a_AD, b_WD)]
        return 2.0 * products_AW - (squares[0][:, None] + squares[1][None, :])
    return products_AW


def pair_scores(a: jax.Array, b: jax.Array, metric: str) -> jax.Array:
    """Scores of vectors along the last axis, l2 squared: equal vectors get equal scores."""
    a = jnp.broadcast_to(a, b.shape)
    if metric == "l1":
        return -jnp.sum(jnp.abs(a - b), axis=-1)
    if metric == "l2":
        return -jnp.sum(jnp.square(a - b), axis=-1)
    return jnp.sum(a * b, axis=-1)


def tile_error(norm_A: jax.Array, max_norm: jax.Array, width: int, metric: str) -> jax.Array:
    """How far a tile's scores of rows with these norms may be from the truth, float32 [A].

    `max_norm` bounds the other row's norm. Units are those of the scores (l2: squares).
    """
    if metric == "cosine":
        size_A = jnp.ones_like(norm_A)
    elif metric == "dot":
        size_A = norm_A * max_norm
    else:
        size_A = jnp.square(norm_A + max_norm) if metric == "l2" else norm_A + max_norm
    return _relative_error(width) * size_A + width * jnp.finfo(jnp.float32).tiny


def closeness_bound(score_A: jax.Array, error_A: jax.Array, metric: str) -> jax.Array:
    """An upper bound of the closeness of pairs whose tile score is at most `score_A`."""
    upper_A = score_A + error_A + 2 * UNIT * jnp.abs(score_A)
    if metric == "l2":
        upper_A = -jnp.sqrt(jnp.maximum(-upper_A, 0.0)) * (1 - 4 * UNIT)
    return jnp.where(jnp.isneginf(score_A), -jnp.inf, upper_A)


def pair_closeness(scores: jax.Array, norm_A: jax.Array, max_norm: jax.Array, width: int, metric: str):
    """(closeness, its error) of pair scores [A, ...] of rows with these norms, both [A, ...].

    Differences are taken before they are squared or summed, so for distances the error is relative.
    """
    if metric in ("cosine", "dot"):
        error_A = tile_error(norm_A, max_norm, width, metric)
        error_A = error_A.reshape(error_A.shape + (1,) * (scores.ndim - 1))
        return scores, jnp.broadcast_to(error_A, scores.shape)
    closeness = -jnp.sqrt(-scores) if metric == "l2" else scores
    return closeness, _relative_error(width) * jnp.abs(closeness) + width * jnp.finfo(jnp.float32).tiny


def closeness_change(before_VD: jax.Array, after_VD: jax.Array, valid_V: jax.Array, metric: str) -> jax.Array:
    """How much the closeness of each row to any valid row may have changed, rounded up: float32 [V]."""
    width = before_VD.shape[1]
    relative = 1.0 + _relative_error(width)
    lost = float(np.sqrt(width * np.finfo(np.float32).tiny))  # of a norm: squares that underflowed to 0

    def norm(x_VD: jax.Array) -> jax.Array:  # one pass over the matrix, where `norms` takes two
        if metric == "l1":
            return jnp.sum(jnp.abs(x_VD), axis=1)
        return jnp.sqrt(jnp.sum(jnp.square(x_VD), axis=1))

    def largest(x_V: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(valid_V, x_V, 0.0))

    step_V = norm(after_VD - before_VD) * relative + lost
    if metric in ("l1", "l2"):  # the triangle inequality, once for each row of a pair
        return round_up(step_V + largest(step_V))
    before_V, after_V = norm(before_VD), norm(after_VD)
    if metric == "dot":  # a'·b' - a·b = (a' - a)·b' + a·(b' - b)
        before_V, after_V = before_V + lost, after_V + lost
        return round_up((step_V * largest(after_V) + before_V * largest(step_V)) * relative)
    # |a'/|a'| - a/|a|| ≤ 2 |a' - a| / (|a'| + |a|): Dunkl and Williams, 1964
    total_V = before_V + after_V
    turn_V = 2.0 * step_V / jnp.where(total_V > 0, total_V, 1.0) * relative
    turn_V = jnp.where((total_V > 0) & jnp.isfinite(total_V), jnp.minimum(turn_V, 2.0), 2.0)
    return round_up(turn_V + largest(turn_V))


def round_up(x: jax.Array) -> jax.Array:
    """At least the real sum or product of which x is the rounded one."""
    return x + 4 * UNIT * jnp.abs(x)


def _relative_error(width: int) -> float:
    """Of a sum of `width` float32 products, with the rounding of the norms, and of unit rows, in it."""
    return (2 * width + 16) * UNIT


def _l1_distances(a_AD: jax.Array, b_WD: jax.Array) -> jax.Array:
    """Σ_d |a_d - b_d| [A, W], a few dimensions a pass: no [A, W, D], which no matrix product can avoid."""
    pad = -a_AD.shape[1] % _L1_WIDTH
    by_width = [jnp.pad(x, ((0, 0), (0, pad))).T.reshape(-1, _L1_WIDTH, x.shape[0]) for x in (a_AD, b_WD)]

    def add(total_AW: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        a_XA, b_XW = parts
        for d in range(_L1_WIDTH):
            total_AW = total_AW + jnp.abs(a_XA[d][:, None] - b_XW[d][None, :])
        return total_AW, None

    zeros_AW = jnp.zeros((a_AD.shape[0], b_WD.shape[0]), jnp.float32)
    return jax.lax.scan(add, zeros_AW, tuple(by_width))[0]


def _unit_rows(rows_VD: jax.Array) -> jax.Array:
    """Rows of length 1; a zero row stays zero. The largest entry is taken out first, as in `norms`."""
    largest_V1 = jnp.max(jnp.abs(rows_VD), axis=1, keepdims=True)
    scaled_VD = rows_VD / jnp.where(largest_V1 > 0, largest_V1, 1.0)
    norm_V1 = jnp.linalg.norm(scaled_VD, axis=1, keepdims=True)
    return scaled_VD / jnp.where(norm_V1 > 0, norm_V1, 1.0)


def first_identical(rows_VD: jax.Array) -> jax.Array:
    """int32 [V]: the lowest id of the rows with the same bits, the row's own where there is no other.

    Rows are compared by two 32-bit hashes. Integer sums do not depend on their order, so identical rows
    always have equal hashes; that any two different rows have them has a chance of V² / 2^65, 1e-9 for V =
    152k.
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
