"""Mixing strategies that only a study needs: other rows in the place of the anchor's neighbours.

  random   the true neighbours' weights, put on rows that are drawn at random at each step
  matched  such rows, with a weight at which the mixture's cosine to its anchor is that of the true mixture

Both write the anchor, at the steps at which N-GRPO would mix. Rows are drawn among the words of the
vocabulary, from a stream of random numbers of their own, so that the same tokens are sampled as in the other
arms.
"""

import functools

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.mixture import (
    STRATEGIES,
    Mixing,
    Mixture,
    Proposal,
    StepContext,
    Strategy,
    neighbor_mixture,
)

ROWS_STREAM = 0xFFFFFFFD  # folded into a sequence's key in the place of a position
READS = frozenset({"k", "metric", "table"})


def register(first_word: int) -> None:
    """Adds both strategies to the package's choices; rows below `first_word` are special tokens."""
    for name, propose in (("random", random_rows), ("matched", matched_rows)):
        strategy = functools.partial(propose, first_word)
        STRATEGIES[name] = Strategy(strategy, READS, uses_table=True)


def random_rows(first_word: int, mixing: Mixing, step: StepContext) -> Proposal:
    """The anchor's mixture with every other candidate replaced by a random row."""
    mixture = _true_mixture(step)
    drawn = _with_random_rows(first_word, step, mixture)
    return Proposal(drawn.ids[:, 0], drawn.ids[:, 0], drawn)


def matched_rows(first_word: int, mixing: Mixing, step: StepContext) -> Proposal:
    """Random rows, and the weight of their sum that gives the true mixture's cosine to the anchor.

    Let a be the anchor's row, p the mean of the random rows by the true neighbours' relative weights, p∥ and
    p⊥ its parts along a and across. The cosine of (1 - w) a + w p is that of an angle with tangent t where w
    |p⊥| = t ((1 - w) |a| + w p∥), so w = t |a| / (|p⊥| + t (|a| - p∥)).
    """
    if step.embedding_VD is None:
        raise ValueError("the matched strategy needs the embedding")
    true = _true_mixture(step)
    drawn = _with_random_rows(first_word, step, true)
    others_BC = true.weights[:, 1:]
    total_B1 = jnp.sum(others_BC, axis=-1, keepdims=True)
    # Where the true mixture is the anchor alone, so is the matched one, whatever these are.
    relative_BC = jnp.where(total_B1 > 0, others_BC / jnp.where(total_B1 > 0, total_B1, 1.0), 1.0)
    rows_BCD = jnp.take(step.embedding_VD, true.ids, axis=0).astype(jnp.float32)
    anchor_BD = rows_BCD[:, 0]
    mixed_BD = jnp.sum(true.weights[..., None] * rows_BCD, axis=1)
    random_BCD = jnp.take(step.embedding_VD, drawn.ids[:, 1:], axis=0).astype(jnp.float32)
    partner_BD = jnp.sum(relative_BC[..., None] * random_BCD, axis=1)
    length_B = jnp.linalg.norm(anchor_BD, axis=-1)
    unit_BD = anchor_BD / jnp.maximum(length_B, 1e-12)[:, None]

    def parts(vector_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        along_B = jnp.sum(vector_BD * unit_BD, axis=-1)
        return along_B, jnp.linalg.norm(vector_BD - along_B[:, None] * unit_BD, axis=-1)

    mixed_along_B, mixed_across_B = parts(mixed_BD)
    along_B, across_B = parts(partner_BD)
    tangent_B = mixed_across_B / jnp.maximum(mixed_along_B, 1e-6)
    divisor_B = across_B + tangent_B * (length_B - along_B)
    share_B = jnp.clip(tangent_B * length_B / jnp.maximum(divisor_B, 1e-6), 0.0, 1.0)
    weights_BC = jnp.concatenate([1.0 - share_B[:, None], share_B[:, None] * relative_BC], axis=1)
    return Proposal(drawn.ids[:, 0], drawn.ids[:, 0], Mixture(drawn.ids, weights_BC))


def _true_mixture(step: StepContext) -> Mixture:
    if step.table_VC is None:
        raise ValueError("the neighbours' weights need a neighbour table")
    return neighbor_mixture(step.logits_BV, step.table_VC)


def _with_random_rows(first_word: int, step: StepContext, mixture: Mixture) -> Mixture:
    """The mixture with uniform draws among the words but the anchor in the place of its other candidates."""
    words, count = step.logits_BV.shape[1] - first_word, mixture.ids.shape[1] - 1

    def draw(key_2: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), ROWS_STREAM)
        return jax.random.randint(jax.random.fold_in(key, position), (count,), 0, words - 1)

    drawn_BC = first_word + jax.vmap(draw)(step.keys_B2, step.position_B)
    anchor_B1 = mixture.ids[:, :1]
    drawn_BC = drawn_BC + (drawn_BC >= anchor_B1)
    return Mixture(jnp.concatenate([anchor_B1, drawn_BC], axis=1).astype(jnp.int32), mixture.weights)
