"""Logits to a token: one uniform number and an inverse CDF, with top-k and the nucleus.

Owns: the division by the temperature, the draw, the truncations. Must not know: keys and slots (a uniform
number arrives for each row), mixtures, stop ids.

`jax.random.categorical` would draw and compare V Gumbel numbers a row. Here a row is read once for the sums
of its blocks, and then one block of it again.

Letters of this file: N blocks of a row, W entries of a block, M largest logits of a row.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ngrpo_jax.algo.bits import ordered, unordered

# Entries of one block of the two-level search: about the square root of a vocabulary, and whole vector lanes.
_BLOCK = 256
# The nucleus is sought among so many of the largest logits before the whole row is searched.
_NUCLEUS = 128


def scaled(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """(2): float32 logits divided by the temperature; sampler and trainer both take theirs from here.

    A Python number that is not above 0 raises ValueError: greedy decoding is `greedy`, not a division.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0: greedy decoding does not scale logits")
    return logits.astype(jnp.float32) / temperature


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The most probable token, of equals the lower id: int32 [B]."""
    chex.assert_rank(logits_BV, 2)
    # The block first: `sample` needs its maxima as well, and an argmax of whole rows carries pairs.
    block_B = jnp.argmax(_by_block(_maximum, logits_BV), axis=-1)
    start_B, inside_BW = _block(logits_BV, block_B)
    return (start_B + jnp.argmax(inside_BW, axis=-1)).astype(jnp.int32)


def sample(logits_BV: jax.Array, uniform_B: jax.Array, *, top_p: float = 1.0, top_k: int = 0) -> jax.Array:
    """(3)(4): one token a row from softmax(logits), int32 [B], by inverting its CDF at `uniform_B` in [0, 1).

    `logits_BV` are divided by the temperature already; `top_p` and `top_k` truncate them first, see
    `truncate`. The CDF runs over ids in their order. A row's token depends on that row alone, and is never
    one of probability 0 (such as a logit of -inf). The law is the softmax up to the resolution of a float32
    uniform: 2^-23 of probability for a token.
    """
    chex.assert_rank(logits_BV, 2)
    chex.assert_shape(uniform_B, logits_BV.shape[:1])
    logits_BV = truncate(logits_BV.astype(jnp.float32), top_p=top_p, top_k=top_k)
    largest_B1, sums_BN = _block_masses(logits_BV)
    block_B, residual_B = _invert(sums_BN, uniform_B * jnp.sum(sums_BN, axis=-1))
    start_B, inside_BW = _block(logits_BV, block_B)
    ids_BW = start_B[:, None] + jnp.arange(inside_BW.shape[1], dtype=jnp.int32)[None, :]
    mass_BW = jnp.where(ids_BW >= (block_B * _BLOCK)[:, None], jnp.exp(inside_BW - largest_B1), 0.0)
    entry_B, _ = _invert(mass_BW, residual_B)
    return start_B + entry_B


def log_total(logits_BV: jax.Array) -> jax.Array:
    """Log-sum-exp of each row, [B]; not finite where a logit is NaN or +inf, or all are -inf.

    From the same sums as `sample`, so that a program which does both to the same logits reads them once.
    """
    largest_B1, sums_BN = _block_masses(logits_BV.astype(jnp.float32))
    return largest_B1[:, 0] + jnp.log(jnp.sum(sums_BN, axis=-1))


def _block_masses(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's largest logit [B, 1], and Σ exp(logit - largest) of its blocks [B, N]."""
    largest_B1 = jnp.max(_by_block(_maximum, logits_BV), axis=-1, keepdims=True)
    return largest_B1, _by_block(lambda x: jnp.sum(jnp.exp(x - largest_B1[:, :, None]), axis=-1), logits_BV)


def _by_block(reduce: Callable[[jax.Array], jax.Array], x_BV: jax.Array) -> jax.Array:
    """`reduce` over the last axis of every block of a row, the last of which may be shorter: [B, N]."""
    B, size = x_BV.shape
    width = min(_BLOCK, size)
    whole = size // width * width
    reduced_BN = reduce(x_BV[:, :whole].reshape(B, whole // width, width))
    if whole == size:
        return reduced_BN
    return jnp.concatenate([reduced_BN, reduce(x_BV[:, None, whole:])], axis=1)


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
    """The logits that ordinary sampling may draw from, -inf in place of the others: [B, V].

    Static `top_k` > 0 keeps the top_k most probable tokens; static `top_p` < 1 then keeps the nucleus of what
    is left, renormalised: the fewest most probable tokens whose mass reaches top_p, at least one. Of equally
    probable tokens the lower id is kept. 0 and 1 keep everything.

    Raises ValueError for a negative top_k or a top_p outside 0..1.
    """
    if top_k < 0 or not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_k is {top_k} and top_p {top_p}: they must be at least 0, and from 0 to 1")
    chex.assert_rank(logits_BV, 2)
    size = logits_BV.shape[1]
    if 0 < top_k < size:
        top_BM, ids_BM = jax.lax.top_k(logits_BV, top_k)
        last_B = jnp.full(logits_BV.shape[:1], top_k - 1)
        if top_p < 1.0:
            mass_BM = jnp.exp(top_BM - top_BM[:, :1])
            last_B, _ = _nucleus_end(mass_BM, top_p * jnp.sum(mass_BM, axis=-1))
        value_B, id_B = _pick(top_BM, last_B), _pick(ids_BM, last_B)
    elif top_p < 1.0:
        value_B, id_B = _nucleus_cut(logits_BV, top_p)
    else:
        return logits_BV
    return jnp.where(_up_to(logits_BV, value_B, id_B), logits_BV, -jnp.inf)


def _nucleus_cut(logits_BV: jax.Array, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The last token of each row's nucleus, by falling logit and rising id: its logit and id, [B] each.

    A row whose nucleus lies within its largest few logits needs no more than those; the search of whole
    rows is skipped where that is so for every row.
    """
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    mass_BV = jnp.exp(logits_BV - largest_B1)
    target_B = top_p * jnp.sum(mass_BV, axis=-1)
    top_BM, ids_BM = jax.lax.top_k(logits_BV, min(_NUCLEUS, logits_BV.shape[1]))
    last_B, covered_B = _nucleus_end(jnp.exp(top_BM - largest_B1), target_B)
    few = _pick(top_BM, last_B), _pick(ids_BM, last_B)
    if logits_BV.shape[1] <= _NUCLEUS:
        return few
    full = jax.lax.cond(
        jnp.all(covered_B), lambda: few, lambda: _search_nucleus_cut(logits_BV, mass_BV, target_B)
    )
    return jnp.where(covered_B, few[0], full[0]), jnp.where(covered_B, few[1], full[1])


def _nucleus_end(mass_BM: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where masses in falling order first reach the target [B], and whether they do; else their end."""
    reaches_BM = jnp.cumsum(mass_BM, axis=-1) >= target_B[:, None]
    covered_B = jnp.any(reaches_BM, axis=-1)
    return jnp.where(covered_B, jnp.argmax(reaches_BM, axis=-1), mass_BM.shape[1] - 1), covered_B


def _search_nucleus_cut(
    logits_BV: jax.Array, mass_BV: jax.Array, target_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_nucleus_cut` by bisection, without a sort: over all float32 values, then over the ids of the tie."""
    keys_BV = ordered(logits_BV)

    def mass_from(key_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keys_BV >= key_B[:, None], mass_BV, 0.0), axis=-1)

    # From -inf on, should rounding leave the whole row short of a target that is all but all of it.
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
    """The largest int32 at which `holds`, which is true from `low_B` up to it and false from `high_B` on."""

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


def _pick(values_BM: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BM, index_B[:, None], axis=1)[:, 0]


def _invert(mass_BN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry whose cumulative mass passes the target, and what is left of the target there.

    Only entries with mass can be chosen: a parallel prefix sum may rise by rounding where the mass is 0,
    and the target may round up to the total; the last entry with mass then takes it.
    """
    upto_BN = jnp.cumsum(mass_BN, axis=-1)
    some_BN = mass_BN > 0
    passes_BN = (upto_BN > target_B[:, None]) & some_BN
    last_B = mass_BN.shape[1] - 1 - jnp.argmax(some_BN[:, ::-1], axis=-1)
    entry_B = jnp.where(jnp.any(passes_BN, axis=-1), jnp.argmax(passes_BN, axis=-1), last_B).astype(jnp.int32)
    residual_B = target_B - _pick(upto_BN - mass_BN, entry_B)
    return entry_B, jnp.maximum(residual_B, 0.0)
