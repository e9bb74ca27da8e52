"""`Mixing`: what the rollout does to its inputs, the gate that takes a proposed mixture, the end of mixing.

Owns the settings of the method and when they apply. Must not know what a strategy proposes (strategies.py),
the model, the scheduler's slots, or tokenizers: ids arrive as integers.

Letter of this file: E response tokens at the end of a sequence.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.mixture.inputs import Mixture, one_hot
from ngrpo_jax.algo.mixture.strategies import STRATEGIES, StepContext, Strategy
from ngrpo_jax.algo.neighbors import METRICS

# Choices of the neighbour strategy; the first of each is the paper's.
TABLES = ("embedding", "head")
WEIGHTS = ("logits", "probs")
TOKENS = ("anchor", "sampled")
UntilIds = tuple[int | tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What the rollout does to its inputs; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      strategy: "neighbor" (6)-(10), "soft", "gumbel", "noise" (strategies.py), or "none": ordinary sampling.
      rate: ρ of (11), the probability that a step is mixed before mixing has ended, 0..1.
      k: candidates of a mixture with the anchor, at least 1; "noise" has one candidate whatever k is.
      metric: nearness of rows, "cosine" (8), "l2", "l1" or "dot".
      until_ids: each entry an id, or a tuple of consecutive ids; the first entry that the response completes
        ends mixing from the next step on. Empty: mixing never ends.
      table: rows that are compared for neighbours, the input "embedding"'s or the output "head"'s.
      weights: of neighbours, softmax of their "logits" (9) or of their "probs" (the authors' release).
      token: written at a mixed step of "neighbor", the "anchor" or the "sampled" one (the release).
      sigma: standard deviation of "noise", in multiples of the root mean square of the embedded row.
      keep_out_ids: tokens that stay out of mixing. A step whose anchor is one of them is not mixed, and none
        of them has weight in another anchor's mixture (a neighbour table must be built without them). The
        anchor of "neighbor" and "soft" is the most likely token, that of the others the sampled one.

    Raises ValueError, naming the field, where a value is none of these.
    """

    strategy: str = "neighbor"
    rate: float = 0.1
    k: int = 3
    metric: str = "cosine"
    until_ids: UntilIds = ()
    table: str = "embedding"
    weights: str = "logits"
    token: str = "anchor"
    sigma: float = 0.33
    keep_out_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        choices = dict(strategy=STRATEGIES, metric=METRICS, table=TABLES, weights=WEIGHTS, token=TOKENS)
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"mixing {name} {value!r} is unknown: use one of {', '.join(known)}")
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"mixing rate {self.rate} is no probability: it must lie between 0 and 1")
        if self.k < 1:
            raise ValueError(f"mixing k {self.k} is too small: k counts the anchor, so it must be at least 1")
        if not 0.0 <= self.sigma < float("inf"):
            raise ValueError(f"mixing sigma {self.sigma} is no standard deviation: it must be 0 or above")
        for ids in _sequences(self.until_ids):
            if not ids or not _are_ids(ids):
                raise ValueError(
                    f"mixing until_ids {self.until_ids} is malformed: an entry is an id or a tuple of ids"
                )
        if not _are_ids(self.keep_out_ids):
            raise ValueError(f"mixing keep_out_ids {self.keep_out_ids[:5]}... must be a tuple of ids")

    @property
    def _strategy(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def mixes(self) -> bool:
        """Whether any input can be a mixture; without, the compiled step has no gate."""
        return self._strategy.mixes

    @property
    def uses_table(self) -> bool:
        """Whether a neighbour table is needed."""
        return self._strategy.uses_table

    @property
    def noisy(self) -> bool:
        """Whether mixtures carry `Noise`."""
        return self._strategy.noisy

    @property
    def candidates(self) -> int:
        """C of the mixtures that a rollout records."""
        return self.k if "k" in self._strategy.reads else 1

    def keep_out_mask(self, vocab_size: int) -> jax.Array:
        """bool [V]: `keep_out_ids` as a mask; a constant of the compiled program."""
        mask_V = np.zeros(vocab_size, bool)
        mask_V[list(self.keep_out_ids)] = True
        return jnp.asarray(mask_V)


def next_input(mixing: Mixing, step: StepContext, open_B: jax.Array) -> tuple[jax.Array, Mixture, jax.Array]:
    """(4)-(11): written tokens [B], next inputs [B, C], and which of them are mixed [B].

    `open_B` bool: whether the gate of (11) is open. A sequence is mixed where it is, unless its anchor is one
    of `mixing.keep_out_ids`; the others write and feed the sampled token. Raises ValueError for k > V.
    """
    if mixing.candidates > step.logits_BV.shape[1]:
        raise ValueError(
            f"mixing k is {mixing.k}, but there are only {step.logits_BV.shape[1]} rows in the vocabulary"
        )
    proposal = STRATEGIES[mixing.strategy].propose(mixing, step)
    chex.assert_equal_shape([proposal.anchor_B, proposal.token_B, step.token_B, open_B])
    mixed_B = open_B
    if mixing.keep_out_ids:
        mixed_B = open_B & ~mixing.keep_out_mask(step.logits_BV.shape[1])[proposal.anchor_B]
    ordinary = one_hot(step.token_B, mixing.candidates)
    if proposal.mixture.noise is not None:
        noise = proposal.mixture.noise
        ordinary = ordinary._replace(noise=noise._replace(scale=jnp.zeros_like(noise.scale)))

    def choose(mixed: jax.Array, plain: jax.Array) -> jax.Array:
        return jnp.where(mixed_B.reshape(-1, *[1] * (mixed.ndim - 1)), mixed, plain)

    token_B = choose(proposal.token_B, step.token_B)
    return token_B, jax.tree.map(choose, proposal.mixture, ordinary), mixed_B


def tail_length(until_ids: UntilIds) -> int:
    """How many of the latest response tokens `completed` needs: the longest entry; 0 where there is none."""
    return max((len(ids) for ids in _sequences(until_ids)), default=0)


def completed(until_ids: UntilIds, tail_BE: jax.Array) -> jax.Array:
    """bool [B]: whether the latest token of each response completes an entry of `until_ids`.

    `tail_BE` int32 holds the E ≥ tail_length(until_ids) latest response tokens, latest last, and -1 where the
    response had none yet: so no entry is ever matched across the end of the prompt.
    """
    chex.assert_rank(tail_BE, 2)
    done_B = jnp.zeros(tail_BE.shape[:1], bool)
    for ids in _sequences(until_ids):
        latest = tail_BE[:, tail_BE.shape[1] - len(ids) :]
        entry = jnp.broadcast_to(jnp.asarray(ids, tail_BE.dtype), (tail_BE.shape[0], len(ids)))
        chex.assert_equal_shape([latest, entry])
        done_B = done_B | jnp.all(latest == entry, axis=-1)
    return done_B


def _sequences(until_ids: UntilIds) -> list[tuple[int, ...]]:
    """Every entry as a tuple of ids."""
    return [ids if isinstance(ids, tuple) else (ids,) for ids in until_ids]


def _are_ids(ids: tuple[int, ...]) -> bool:
    return all(isinstance(i, int) and i >= 0 for i in ids)
