"""The mixing strategies: tempered logits and a drawn token in, the written token and the next input out.

Owns: what each strategy of `Mixing` proposes, and when a proposal is taken. Must not know: the model, slots
and scans, tokenizers, where a neighbour table comes from, or how the recorded mixtures are replayed: all
that a replay needs is in the Mixture (ids, weights, noise).

A strategy is one small function from `Draw` to `Proposal`:

  neighbor  the most likely token and its neighbours, equations (6)-(10) of arXiv 2606.10768
  soft      the k most likely tokens, weighted by their probabilities (Soft Thinking, arXiv 2505.15778)
  gumbel    the k largest of logits + Gumbel noise, weighted by their softmax (arXiv 2511.06411)
  noise     the drawn token's row plus Gaussian noise (Soft Tokens, Hard Truths, arXiv 2509.19170)

Random numbers beyond the two of an ordinary step come from streams of their own, so that a strategy does not
change which tokens are drawn.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo import sampling
from ngrpo_jax.algo.mixture import Mixing, Mixture, Noise, neighbor_mixture, one_hot

# Folded into a sequence's key in the place of a position; no response is so long.
NOISE_STREAM = 0xFFFFFFFF
GUMBEL_STREAM = 0xFFFFFFFE


class Draw(NamedTuple):
    """What a step knows of B sequences before their inputs are mixed.

    Attributes:
      logits_BV: divided by the temperature, not truncated.
      truncated_logits_BV: the same where top-k and top-p keep a token, -inf elsewhere: `token_B` was drawn
        from their softmax.
      token_B: int32, the ordinary draw.
      keys_B2: uint32 key data of each sequence.
      position_B: int32, response tokens before this one.
      table_VC: neighbour table, or None where the strategy has no use for one.
      temperature: the one that divided the logits.
    """

    logits_BV: jax.Array
    truncated_logits_BV: jax.Array
    token_B: jax.Array
    keys_B2: jax.Array
    position_B: jax.Array
    table_VC: jax.Array | None
    temperature: float


class Proposal(NamedTuple):
    """What a strategy would do at every row: int32 [B] `token_B` written, Mixture [B, C] fed.

    `anchor_B` int32 is the token that the mixture is made around: one that is to stay out of mixing calls
    the proposal off.
    """

    anchor_B: jax.Array
    token_B: jax.Array
    mixture: Mixture


def next_input(mixing: Mixing, draw: Draw, open_B: jax.Array) -> tuple[jax.Array, Mixture, jax.Array]:
    """(4)-(11): written tokens [B], next inputs [B, C], and which of them are mixed [B].

    `open_B` bool: whether the gate of (11) is open. A row is mixed where it is, unless its anchor is one of
    `mixing.keep_out_ids`; all other rows get their ordinary draw. Raises ValueError for k > V.
    """
    if mixing.candidates > draw.logits_BV.shape[1]:
        raise ValueError(
            f"mixing k is {mixing.k}, but there are only {draw.logits_BV.shape[1]} rows in the vocabulary"
        )
    proposal = _PROPOSALS[mixing.strategy](mixing, draw)
    chex.assert_equal_shape([proposal.anchor_B, proposal.token_B, draw.token_B, open_B])
    mixed_B = open_B
    if mixing.keep_out_ids:
        mixed_B = open_B & ~kept_out(mixing, draw.logits_BV.shape[1])[proposal.anchor_B]
    plain = one_hot(draw.token_B, mixing.candidates)
    if proposal.mixture.noise is not None:
        noise = proposal.mixture.noise
        plain = plain._replace(noise=noise._replace(scale=jnp.zeros_like(noise.scale)))

    def choose(mixed: jax.Array, ordinary: jax.Array) -> jax.Array:
        return jnp.where(mixed_B.reshape(-1, *[1] * (mixed.ndim - 1)), mixed, ordinary)

    token_B = jnp.where(mixed_B, proposal.token_B, draw.token_B)
    return token_B, jax.tree.map(choose, proposal.mixture, plain), mixed_B


def kept_out(mixing: Mixing, vocab_size: int) -> jax.Array:
    """bool [V]: `mixing.keep_out_ids` as a mask; a constant of the compiled program."""
    mask_V = np.zeros(vocab_size, bool)
    mask_V[list(mixing.keep_out_ids)] = True
    return jnp.asarray(mask_V)


def neighbor(mixing: Mixing, draw: Draw) -> Proposal:
    """(6)-(10), with the release's two departures by `mixing.weights` and `mixing.token`."""
    if draw.table_VC is None:
        raise ValueError("the neighbor strategy needs a neighbour table")
    mixture = neighbor_mixture(
        draw.logits_BV, draw.table_VC, weights=mixing.weights, temperature=draw.temperature
    )
    anchor_B = mixture.ids[:, 0]
    return Proposal(anchor_B, anchor_B if mixing.token == "anchor" else draw.token_B, mixture)


def soft(mixing: Mixing, draw: Draw) -> Proposal:
    """Soft Thinking: probabilities of the k most likely tokens, renormalised; the most likely is written."""
    anchor_B = sampling.greedy(draw.logits_BV)
    logits_BV = draw.logits_BV
    if mixing.keep_out_ids:
        logits_BV = jnp.where(kept_out(mixing, logits_BV.shape[1])[None, :], -jnp.inf, logits_BV)
    top_BC, ids_BC = jax.lax.top_k(logits_BV, mixing.k)
    # Where every token is kept out there is nothing to take the softmax of; such a row is never mixed.
    top_BC = jnp.where(jnp.isneginf(top_BC[:, :1]), 0.0, top_BC)
    return Proposal(anchor_B, anchor_B, Mixture(ids_BC.astype(jnp.int32), jax.nn.softmax(top_BC, axis=-1)))


def gumbel(mixing: Mixing, draw: Draw) -> Proposal:
    """The k largest of law + Gumbel noise, from the largest down, without V random numbers.

    The largest is a draw from the law and its value a Gumbel around the law's log-sum-exp, independent of
    which token it is; given those, the next is a draw from the rest, its value a Gumbel around the rest's
    log-sum-exp cut off at the value above (top-down sampling; Maddison et al. 2014, Kool et al. 2019). So the
    first candidate is the ordinary draw itself, and the law of written tokens is that of ordinary steps.
    """
    uniforms_BN = _uniforms(draw, 2 * mixing.k - 1)
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, draw.truncated_logits_BV.shape, 1)
    rest_BV, id_B = draw.truncated_logits_BV, draw.token_B
    ceiling_B, left_B = jnp.full(id_B.shape, jnp.inf), jnp.ones(id_B.shape, bool)
    ids, values = [], []
    for c in range(mixing.k):
        if c > 0:
            rest_BV = jnp.where(ids_BV == id_B[:, None], -jnp.inf, rest_BV)
            left_B = left_B & (jnp.max(rest_BV, axis=-1) > -jnp.inf)  # a nucleus may hold fewer than k
            rest_BV = jnp.where(left_B[:, None], rest_BV, draw.truncated_logits_BV)
            id_B = sampling.sample(rest_BV, uniforms_BN[:, mixing.k + c - 1])
        centre_B = jax.nn.logsumexp(rest_BV, axis=-1)
        ceiling_B = centre_B - jnp.log(jnp.exp(centre_B - ceiling_B) - jnp.log(uniforms_BN[:, c]))
        ids.append(jnp.where(left_B, id_B, draw.token_B))
        values.append(jnp.where(left_B, ceiling_B, -jnp.inf))
    ids_BC, values_BC = jnp.stack(ids, axis=1), jnp.stack(values, axis=1)
    if mixing.keep_out_ids:
        out_BC = kept_out(mixing, draw.truncated_logits_BV.shape[1])[ids_BC]
        values_BC = jnp.where(out_BC.at[:, 0].set(False), -jnp.inf, values_BC)
    return Proposal(draw.token_B, draw.token_B, Mixture(ids_BC, jax.nn.softmax(values_BC, axis=-1)))


def noise(mixing: Mixing, draw: Draw) -> Proposal:
    """The drawn token with σ · rms · N(0, I), replayed from a key of the sequence's own."""

    def stream(key_2: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(_key(key_2), NOISE_STREAM))

    scale_B = jnp.full(draw.token_B.shape, mixing.sigma, jnp.float32)
    replay = Noise(jax.vmap(stream)(draw.keys_B2), draw.position_B.astype(jnp.int32), scale_B)
    return Proposal(draw.token_B, draw.token_B, one_hot(draw.token_B, 1)._replace(noise=replay))


_PROPOSALS: dict[str, Callable[[Mixing, Draw], Proposal]] = {
    "neighbor": neighbor,
    "soft": soft,
    "gumbel": gumbel,
    "noise": noise,
}


def _key(key_2: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key_2, impl="threefry2x32")


def _uniforms(draw: Draw, count: int) -> jax.Array:
    """float32 [B, count] in (0, 1), of the Gumbel stream at each row's position."""

    def of_row(key_2: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(_key(key_2), GUMBEL_STREAM), position)
        return jax.random.uniform(key, (count,), jnp.float32, minval=jnp.finfo(jnp.float32).tiny)

    return jax.vmap(of_row)(draw.keys_B2, draw.position_B)
