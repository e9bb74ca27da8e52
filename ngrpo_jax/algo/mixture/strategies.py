"""The mixing strategies: logits and sampled token of a decode step in, written token and next input out.

Owns `STRATEGIES`: for each name of `Mixing.strategy` one object with what it needs and what it proposes. A
new strategy is a function and an entry here. Must not know: the model, the scheduler's slots, tokenizers,
where a neighbour table comes from, or how recorded mixtures are replayed: a replay needs the Mixture alone.

  neighbor  the most likely token and its neighbours, (6)-(10)
  soft      the k most likely tokens, weighted by their probabilities (Soft Thinking, arXiv 2505.15778)
  gumbel    the k largest of logits + Gumbel noise, weighted by their softmax (arXiv 2511.06411)
  noise     the sampled token's row plus Gaussian noise (Soft Tokens, Hard Truths, arXiv 2509.19170)

Random numbers beyond the two of an ordinary step come from streams of their own, so that the strategy does
not change which tokens are sampled.

Letter of this file: U uniform numbers of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import chex
import jax
import jax.numpy as jnp

from ngrpo_jax.algo import sampling
from ngrpo_jax.algo.mixture.inputs import Mixture, Noise, one_hot

if TYPE_CHECKING:
    from ngrpo_jax.algo.mixture.mixing import Mixing

# Folded into a sequence's key in the place of a position; no response is so long.
NOISE_STREAM = 0xFFFFFFFF
GUMBEL_STREAM = 0xFFFFFFFE


class StepContext(NamedTuple):
    """One decode step of B sequences, before their next inputs are chosen.

    Attributes:
      logits_BV: divided by the temperature, not truncated.
      truncated_logits_BV: the same where top-k and top-p keep a token, -inf elsewhere: `token_B` was sampled
        from their softmax.
      token_B: int32, the sampled tokens of an ordinary step.
      keys_B2: uint32, key data of each sequence.
      position_B: int32, number of response tokens before this one.
      table_VC: neighbour table; None where the strategy uses none.
      temperature: the one that divided the logits.
      embedding_VD: the input embedding, for strategies that need lengths and angles of rows.
    """

    logits_BV: jax.Array
    truncated_logits_BV: jax.Array
    token_B: jax.Array
    keys_B2: jax.Array
    position_B: jax.Array
    table_VC: jax.Array | None
    temperature: float
    embedding_VD: jax.Array | None = None


class Proposal(NamedTuple):
    """What a strategy would write and feed in every sequence, were all of them mixed.

    Attributes:
      anchor_B: int32, the token that the mixture is made around. A sequence whose anchor is one of
        `Mixing.keep_out_ids` is not mixed.
      token_B: int32, the token to write.
      mixture: Mixture [B, C], the next input.
    """

    anchor_B: jax.Array
    token_B: jax.Array
    mixture: Mixture


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to mix inputs.

    Attributes:
      propose: the next inputs of one step.
      reads: the settings of `Mixing`, and of the section `mixing` of a config, that `propose` depends on. A
        strategy that reads "k" has k candidates in a mixture, any other one.
      uses_table: whether `StepContext.table_VC` has to be there.
      noisy: whether its mixtures carry `Noise`.
      mixes: whether it proposes anything but the ordinary input.
    """

    propose: Callable[[Mixing, StepContext], Proposal]
    reads: frozenset[str] = frozenset()
    uses_table: bool = False
    noisy: bool = False
    mixes: bool = True


def neighbor_mixture(
    logits_BV: jax.Array, table_VC: jax.Array, *, weights: str = "logits", temperature: float = 1.0
) -> Mixture:
    """(6)-(9): the anchor's neighbour mixture [B, C], anchor first.

    `logits_BV` are divided by the temperature already and not truncated; `table_VC` comes from
    `neighbors.neighbor_table`, whose column 0 is the row itself. Of equal largest logits the lower id is
    the anchor. The weights are the softmax over the C candidates alone, so C = 1 gives weight 1.

    `weights` "probs" is what the authors' release does: probabilities in the place of logits, so that α(c)
    is in proportion to exp(p(c) / temperature) and stays near 1/C. `temperature` is read for that alone.
    """
    chex.assert_rank([logits_BV, table_VC], 2)
    chex.assert_shape(table_VC, (logits_BV.shape[1], None))
    ids_BC = jnp.take(table_VC, sampling.greedy(logits_BV), axis=0, mode="clip").astype(jnp.int32)
    logits_BC = jnp.take_along_axis(logits_BV, ids_BC, axis=-1, mode="clip").astype(jnp.float32)
    if weights == "probs":
        logits_BC = jnp.exp(logits_BC - sampling.log_total(logits_BV)[:, None]) / temperature
    return Mixture(ids_BC, jax.nn.softmax(logits_BC, axis=-1))


def ordinary(mixing: Mixing, step: StepContext) -> Proposal:
    """(4)(5): the sampled token."""
    return Proposal(step.token_B, step.token_B, one_hot(step.token_B, 1))


def neighbor(mixing: Mixing, step: StepContext) -> Proposal:
    """(6)-(10), with the release's two departures by `mixing.weights` and `mixing.token`."""
    if step.table_VC is None:
        raise ValueError("the neighbor strategy needs a neighbour table")
    mixture = neighbor_mixture(
        step.logits_BV, step.table_VC, weights=mixing.weights, temperature=step.temperature
    )
    anchor_B = mixture.ids[:, 0]
    return Proposal(anchor_B, anchor_B if mixing.token == "anchor" else step.token_B, mixture)


def soft(mixing: Mixing, step: StepContext) -> Proposal:
    """Soft Thinking: probabilities of the k most likely tokens, renormalised; the most likely is written."""
    anchor_B = sampling.greedy(step.logits_BV)
    logits_BV = step.logits_BV
    if mixing.keep_out_ids:
        logits_BV = jnp.where(mixing.keep_out_mask(logits_BV.shape[1])[None, :], -jnp.inf, logits_BV)
    top_BC, ids_BC = jax.lax.top_k(logits_BV, mixing.k)
    # Where every token is kept out, a softmax of -inf alone would be NaN; such a row is never mixed.
    top_BC = jnp.where(jnp.isneginf(top_BC[:, :1]), 0.0, top_BC)
    return Proposal(anchor_B, anchor_B, Mixture(ids_BC.astype(jnp.int32), jax.nn.softmax(top_BC, axis=-1)))


def gumbel(mixing: Mixing, step: StepContext) -> Proposal:
    """The k largest of truncated logits + Gumbel noise, largest first, from 2k - 1 random numbers and not V.

    Top-down sampling (Maddison et al. 2014, Kool et al. 2019): the largest perturbed logit belongs to a
    token sampled from the softmax, and its value is a Gumbel number around the log-sum-exp, independent of
    which token it is. Given both, the next largest belongs to a token sampled from the remaining ones, and
    its value is a Gumbel number around their log-sum-exp, cut off at the value above. So the first candidate
    is the step's sampled token, and written tokens are distributed as those of ordinary steps.
    """
    uniforms_BU = _uniforms(step, 2 * mixing.k - 1)
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, step.truncated_logits_BV.shape, 1)
    rest_BV, id_B = step.truncated_logits_BV, step.token_B
    value_B, left_B = jnp.full(id_B.shape, jnp.inf), jnp.ones(id_B.shape, bool)
    ids, values = [], []
    for c in range(mixing.k):
        if c > 0:
            rest_BV = jnp.where(ids_BV == id_B[:, None], -jnp.inf, rest_BV)
            left_B = left_B & (jnp.max(rest_BV, axis=-1) > -jnp.inf)  # a nucleus may hold fewer than k
            rest_BV = jnp.where(left_B[:, None], rest_BV, step.truncated_logits_BV)
            id_B = sampling.sample(rest_BV, uniforms_BU[:, mixing.k + c - 1])
        centre_B = jax.nn.logsumexp(rest_BV, axis=-1)
        value_B = centre_B - jnp.log(jnp.exp(centre_B - value_B) - jnp.log(uniforms_BU[:, c]))
        ids.append(jnp.where(left_B, id_B, step.token_B))
        values.append(jnp.where(left_B, value_B, -jnp.inf))
    ids_BC, values_BC = jnp.stack(ids, axis=1), jnp.stack(values, axis=1)
    if mixing.keep_out_ids:
        out_BC = mixing.keep_out_mask(step.truncated_logits_BV.shape[1])[ids_BC]
        values_BC = jnp.where(out_BC.at[:, 0].set(False), -jnp.inf, values_BC)
    return Proposal(step.token_B, step.token_B, Mixture(ids_BC, jax.nn.softmax(values_BC, axis=-1)))


def noise(mixing: Mixing, step: StepContext) -> Proposal:
    """The sampled token with noise σ · rms · N(0, I), recomputed from a key of the sequence's own."""

    def noise_key(key_2: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(_key(key_2), NOISE_STREAM))

    scale_B = jnp.full(step.token_B.shape, mixing.sigma, jnp.float32)
    replay = Noise(jax.vmap(noise_key)(step.keys_B2), step.position_B.astype(jnp.int32), scale_B)
    return Proposal(step.token_B, step.token_B, one_hot(step.token_B, 1)._replace(noise=replay))


STRATEGIES: dict[str, Strategy] = {
    "none": Strategy(ordinary, mixes=False),
    "neighbor": Strategy(
        neighbor,
        frozenset({"k", "metric", "table", "weights", "token", "distinct_spelling"}),
        uses_table=True,
    ),
    "soft": Strategy(soft, frozenset({"k"})),
    "gumbel": Strategy(gumbel, frozenset({"k"})),
    "noise": Strategy(noise, frozenset({"sigma"}), noisy=True),
}


def _key(key_2: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key_2, impl="threefry2x32")


def _uniforms(step: StepContext, count: int) -> jax.Array:
    """float32 [B, count] in (0, 1), of the Gumbel stream at each sequence's position."""

    def uniforms(key_2: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(_key(key_2), GUMBEL_STREAM), position)
        return jax.random.uniform(key, (count,), jnp.float32, minval=jnp.finfo(jnp.float32).tiny)

    return jax.vmap(uniforms)(step.keys_B2, step.position_B)
