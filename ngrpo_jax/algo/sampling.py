"""Logits to a token: one uniform number and the inverse of the distribution's CDF, with top-k and top-p.

Owns the division by the temperature, sampling and truncation. Must not know: keys and slots (a uniform number
arrives for each row), mixtures, stop ids.

`jax.random.categorical` would make and compare V Gumbel numbers a row. Here a row is read once for the sums
of its blocks, and then one of its blocks again.

Letters of this file: J blocks of a row, W entries of a block, X largest logits of a row.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ngrpo_jax.algo.bits import ordered, unordered

# Entries of one block of the two-level search: about the square root of a vocabulary, in whole vector lanes.
_BLOCK = 256
# The nucleus is looked for among so many of the largest logits before the whole row is searched.
_NUCLEUS = 128


def scaled(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """(2): float32 logits divided by the temperature, for rollout and learner alike.

    A Python number that is not above 0 raises ValueError: greedy decoding is `greedy`, not a division.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0: greedy decoding does not scale logits")
    return logits.astype(jnp.float32) / temperature


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The most probable token, of equals the lower id: int32 [B]."""
    chex.assert_rank(logits_BV, 2)
    # The block first: `sample` needs the blocks' maxima too, and an argmax of whole rows compares ids too.
    block_B = jnp.argmax(_by_block(_maximum, logits_BV), axis=-1)
    start_B, inside_BW = _block(logits_BV, block_B)
    return (start_B + jnp.argmax(inside_BW, axis=-1)).astype(jnp.int32)


def sample(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """(3)(4): one token a row from softmax(logits), int32 [B], by inverting its CDF at `uniform_B` in [0, 1).

    `logits_BV` are divided by the temperature and truncated (`scaled`, `truncate`) already. The CDF runs over
    ids in their order. A row's token depends on that row alone, and never has probability 0 (such as a logit
    of -inf). Tokens have their probabilities up to the resolution of a float32 uniform number, 2^-23.
    """
    chex.assert_rank(logits_BV, 2)
    chex.assert_shape(uniform_B, logits_BV.shape[:1])
    logits_BV = logits_BV.astype(jnp.float32)
    largest_B1, sums_BJ = _block_masses(logits_BV)
    block_B, residual_B = _invert(sums_BJ, uniform_B * jnp.sum(sums_BJ, axis=-1))
    start_B, inside_BW = _block(logits_BV, block_B)
    ids_BW = start_B[:, None] + jnp.arange(inside_BW.shape[1], dtype=jnp.int32)[None, :]
    mass_BW = jnp.where(ids_BW >= (block_B * _BLOCK)[:, None], jnp.exp(inside_BW - largest_B1), 0.0)
    entry_B, _ = _invert(mass_BW, residual_B)
    return start_B + entry_B


def log_total(logits_BV: jax.Array) -> jax.Array:
    """Log-sum-exp of each row, [B]; not finite where a logit is NaN or +inf, or all are -inf.

    From the same sums as `sample`, so that a program which calls both with the same logits reads them once.
    """
    largest_B1, sums_BJ = _block_masses(logits_BV.astype(jnp.float32))
    return largest_B1[:, 0] + jnp.log(jnp.sum(sums_BJ, axis=-1))


def _block_masses(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's largest logit [B, 1], and Σ exp(logit - largest) of its blocks [B, J]."""
    largest_B1 = jnp.max(_by_block(_maximum, logits_BV), axis=-1, keepdims=True)
    return largest_B1, _by_block(lambda x: jnp.sum(jnp.exp(x - largest_B1[:, :, None]), axis=-1), logits_BV)


def _by_block(reduce: Callable[[jax.Array], jax.Array], x_BV: jax.Array) -> jax.Array:
    """`reduce` over the last axis of every block of a row, the last of which may be shorter: [B, J]."""
    B, size = x_BV.shape
    width = min(_BLOCK, size)
    whole = size // width * width
    reduced_BJ = reduce(x_BV[:, :whole].reshape(B, whole // width, width))
    if whole == size:
        return reduced_BJ
    return jnp.concatenate([reduced_BJ, reduce(x_BV[:, None, whole:])], axis=1)


def _maximum(x: jax.Array) -> jax.Array:
    return jnp.max(x, axis=-1)


def _block(x_BV: jax.Array, block_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One block of each row: (where it begins [B], its entries [B, W]).

    The last block is read from further left where V is no multiple of the width: then it begins earlier.
    """
    width = min(_BLOCK, x_BV.shape[1])
    start_B = jnp.minimum(block_B * width, x_BV.shape[1] - width).astype(jnp.int32)
    rows = jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (width,)))
    return start_B, rows(x_BV, start_B)


def truncate(logits_BV: jax.Array, *, top_p: float = 1.0, top_k: int = 0) -> jax.Array:
    """The logits of the tokens that top-k and top-p keep, -inf in place of the others: [B, V].

    Static `top_k` > 0 keeps the top_k most probable tokens; static `top_p` < 1 then keeps the nucleus of
    their renormalised probabilities: the fewest most probable tokens whose sum reaches top_p, at least one.
    Of equally probable tokens the lower id is kept. 0 and 1 keep everything.

    Raises ValueError for a negative top_k or a top_p outside 0..1.
    """
    if top_k < 0 or not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_k is {top_k} and top_p {top_p}: they must be at least 0, and from 0 to 1")
    chex.assert_rank(logits_BV, 2)
    size = logits_BV.shape[1]
    if 0 < top_k < size:
        top_BX, ids_BX = jax.lax.top_k(logits_BV, top_k)
        last_B = jnp.full(logits_BV.shape[:1], top_k - 1)
        if top_p < 1.0:
            mass_BX = jnp.exp(top_BX - top_BX[:, :1])
            last_B, _ = _nucleus_end(mass_BX, top_p * jnp.sum(mass_BX, axis=-1))
        value_B, id_B = _pick(top_BX, last_B), _pick(ids_BX, last_B)
    elif top_p < 1.0:
        value_B, id_B = _nucleus_cut(logits_BV, top_p)
    else:
        return logits_BV
    return jnp.where(_up_to(logits_BV, value_B, id_B), logits_BV, -jnp.inf)


def _nucleus_cut(logits_BV: jax.Array, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The last token of each row's nucleus, by falling logit and rising id: its logit and id, [B] each.

    Most nuclei lie within a row's few largest logits; whole rows are searched only where some row's does not.
    """
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    mass_BV = jnp.exp(logits_BV - largest_B1)
    target_B = top_p * jnp.sum(mass_BV, axis=-1)
    top_BX, ids_BX = jax.lax.top_k(logits_BV, min(_NUCLEUS, logits_BV.shape[1]))
    last_B, covered_B = _nucleus_end(jnp.exp(top_BX - largest_B1), target_B)
    few = _pick(top_BX, last_B), _pick(ids_BX, last_B)
    if logits_BV.shape[1] <= _NUCLEUS:
        return few
    full = jax.lax.cond(
        jnp.all(covered_B), lambda: few, lambda: _search_nucleus_cut(logits_BV, mass_BV, target_B)
    )
    return jnp.where(covered_B, few[0], full[0]), jnp.where(covered_B, few[1], full[1])


def _nucleus_end(mass_BX: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index at which the sum of falling masses reaches the target (else the last), and whether it does."""
    reaches_BX = jnp.cumsum(mass_BX, axis=-1) >= target_B[:, None]
    covered_B = jnp.any(reaches_BX, axis=-1)
    return jnp.where(covered_B, jnp.argmax(reaches_BX, axis=-1), mass_BX.shape[1] - 1), covered_B


def _search_nucleus_cut(
    logits_BV: jax.Array, mass_BV: jax.Array, target_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_nucleus_cut` without a sort: bisection over float32 values, then over ids of logits at the cut."""
    keys_BV = ordered(logits_BV)

    def mass_from(key_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keys_BV >= key_B[:, None], mass_BV, 0.0), axis=-1)

    # With top_p close to 1, rounding can leave the sum of a whole row below the target: the cut is then -inf.
    bottom_B = ordered(jnp.full(target_B.shape, -jnp.inf))
    above_B = jnp.max(keys_BV, axis=-1) + 1
    cut_B = _bisect(lambda key_B: mass_from(key_B) >= target_B, bottom_B, above_B)

    tie_BV = keys_BV == cut_B[:, None]
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, keys_BV.shape, 1)
    each_B = jnp.max(jnp.where(tie_BV, mass_BV, 0.0), axis=-1)
    wanted_B = jnp.maximum(jnp.ceil((target_B - mass_from(cut_B + 1)) / each_B), 1.0)

    def too_few(id_B: jax.Array) -> jax.Array:
        return jnp.sum(tie_BV & (ids_BV <= id_B[:, None]), axis=-1) < wanted_B

    last_B = jnp.full(target_B.shape, keys_BV.shape[1] - 1)
    id_B = _bisect(too_few, jnp.full(target_B.shape, -1), last_B) + 1
    return unordered(cut_B), id_B


def _bisect(holds: Callable[[jax.Array], jax.Array], low_B: jax.Array, high_B: jax.Array) -> jax.Array:
    """The largest int32 at which `holds` is true: it is so at `low_B`, not at `high_B`, and changes once."""

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = ends
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)  # their sum could overflow
        holds_B = holds(middle_B)
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B)

    return jax.lax.fori_loop(0, 32, halve, (low_B, high_B))[0]


def _up_to(logits_BV: jax.Array, value_B: jax.Array, id_B: jax.Array) -> jax.Array:
    """bool [B, V]: the tokens up to (value, id) in the order of falling logits and rising ids."""
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    tie_BV = (logits_BV == value_B[:, None]) & (ids_BV <= id_B[:, None])
    return (logits_BV > value_B[:, None]) | tie_BV


def _pick(values_BX: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BX, index_B[:, None], axis=1)[:, 0]


def _invert(mass_BJ: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry at which the cumulative mass exceeds the target, and the target less the mass before.

    Only entries with mass are chosen: a parallel prefix sum can rise by rounding where the mass is 0. Where
    the target rounds up to the total, the last entry with mass is chosen.
    """
    upto_BJ = jnp.cumsum(mass_BJ, axis=-1)
    positive_BJ = mass_BJ > 0
    exceeds_BJ = (upto_BJ > target_B[:, None]) & positive_BJ
    last_B = mass_BJ.shape[1] - 1 - jnp.argmax(positive_BJ[:, ::-1], axis=-1)
    entry_B = jnp.where(jnp.any(exceeds_BJ, axis=-1), jnp.argmax(exceeds_BJ, axis=-1), last_B)
    entry_B = entry_B.astype(jnp.int32)
    residual_B = target_B - _pick(upto_BJ - mass_BJ, entry_B)
    return entry_B, jnp.maximum(residual_B, 0.0)
