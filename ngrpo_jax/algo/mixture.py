"""Mixtures, the one kind of input that the model takes, and the settings by which the rollout makes them.

Owns: the `Mixture` type, its embedding (the same look-up in rollout and replay), the neighbour mixture of
the paper, the settings `Mixing` and the end of mixing. Must not know: the other strategies (strategies.py),
the model, slots and scans, tokenizers (ids arrive as integers), or where a neighbour table comes from.

A mixture is C token ids with weights that sum to 1. An ordinary token is the mixture
([o, ...], [1, 0, ...]), so GRPO is N-GRPO that never mixes and there is one code path.
Equation numbers are those of arXiv 2606.10768.
"""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.neighbors import METRICS
from ngrpo_jax.algo.sampling import greedy, log_total

STRATEGIES = ("none", "neighbor", "soft", "gumbel", "noise")
# Choices of the neighbour strategy; the first of each is the paper's.
TABLES = ("embedding", "head")
WEIGHTS = ("logits", "probs")
TOKENS = ("anchor", "sampled")


class Noise(NamedTuple):
    """What rebuilds a token's Gaussian noise: never the noise itself, which would be [..., D].

    `key_data` uint32 [..., 2] is the raw threefry key of its sequence's noise, `position` int32 [...] the
    token's place in its response and `scale` float32 [...] the standard deviation as a multiple of the
    root mean square of the embedded row; 0 leaves the row as it is. The noise depends on nothing else, so
    it is the same wherever the token stands in a packed row and however the arrays are sharded.
    """

    key_data: Any  # jax.Array, or np.ndarray while a rollout's record is on the host
    position: Any
    scale: Any


class Mixture(NamedTuple):
    """Model inputs: `ids` int32 [..., C] and `weights` float32 [..., C] that sum to 1 over C.

    `noise`, over the same leading dimensions, is for the noise baseline of arXiv 2509.19170 alone.
    """

    ids: Any
    weights: Any
    noise: Noise | None = None


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What the rollout does to its inputs; hashable, so that it can be a static argument of `jax.jit`.

    strategy  "neighbor" (6)-(10), "soft", "gumbel", "noise" (strategies.py), "none" for ordinary sampling.
    rate      ρ of (11): the probability that a thinking step is mixed, 0..1.
    k         candidates of a mixture, the anchor included, at least 1; "noise" has the token alone.
    metric    nearness of embedding rows: "cosine" (8), "l2", "l1" or "dot".
    until_ids each entry an id, or a tuple of consecutive ids; the first entry that the response completes
              ends mixing from the next step on. Empty: mixing never ends.
    table     whose rows are compared for neighbours: the input "embedding"'s, or the output "head"'s.
    weights   of neighbours: softmax of their "logits" (9), or of their "probs" (the authors' release).
    token     written at a mixed step of "neighbor": the "anchor", or the "sampled" one (the release).
    sigma     standard deviation of "noise", in multiples of the root mean square of the embedded row.
    keep_out_ids  tokens that stay out of mixing: a step whose anchor is one of them is not mixed, and none of
              them has weight in another's mixture (in a neighbour table that is up to who builds it). The
              anchor of "neighbor" and "soft" is the most likely token, that of the others the drawn one.

    Raises ValueError, naming the field, where a value is none of these.
    """

    strategy: str = "neighbor"
    rate: float = 0.1
    k: int = 3
    metric: str = "cosine"
    until_ids: tuple[int | tuple[int, ...], ...] = ()
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
            if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
                raise ValueError(
                    f"mixing until_ids {self.until_ids} is malformed: an entry is an id or a tuple of ids"
                )
        if not all(isinstance(i, int) and i >= 0 for i in self.keep_out_ids):
            raise ValueError(f"mixing keep_out_ids {self.keep_out_ids[:5]}... must be a tuple of ids")

    @property
    def mixes(self) -> bool:
        """Whether any input can be a mixture; without, no step pays for the question."""
        return self.strategy != "none"

    @property
    def uses_table(self) -> bool:
        """Whether a neighbour table is needed."""
        return self.strategy == "neighbor"

    @property
    def noisy(self) -> bool:
        """Whether mixtures carry `Noise`."""
        return self.strategy == "noise"

    @property
    def candidates(self) -> int:
        """C of the mixtures that a rollout records."""
        return self.k if self.strategy in ("neighbor", "soft", "gumbel") else 1


def one_hot(ids: jax.Array | np.ndarray, size: int) -> Mixture:
    """The mixtures of ordinary tokens: ids [...] -> Mixture [..., size], all weight on the first candidate.

    The candidates without weight repeat the token, so that no other row is read for them.
    """
    shape = (*np.shape(ids), size)
    weights = jnp.zeros(shape, jnp.float32).at[..., 0].set(1.0)
    return Mixture(jnp.broadcast_to(jnp.asarray(ids, jnp.int32)[..., None], shape), weights)


def embed(embedding_VD: jax.Array, mixture: Mixture) -> jax.Array:
    """(10): Σ_c weights[..., c] · E[ids[..., c]] -> [..., D] in the embedding's dtype, plus any noise.

    Weights are constants in the gradient and the embedding is not: every candidate's row gets its share
    (§3.3). Sums are in float32, and an ordinary token embeds to exactly its row. Candidates are added one
    at a time, so that [..., C, D] never exists.
    """
    chex.assert_rank(embedding_VD, 2)
    chex.assert_equal_shape([mixture.ids, mixture.weights])
    total = _weighted_rows(embedding_VD, mixture.ids, mixture.weights.astype(jnp.float32))
    if mixture.noise is not None:
        total = total + _noise(mixture.noise, total)
    return total.astype(embedding_VD.dtype)


@jax.custom_vjp
def _weighted_rows(embedding_VD: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 Σ_c weights[..., c] · E[ids[..., c]].

    The gradient is written out so that all candidates add into one [V, D], not each into its own.
    """
    total = jnp.zeros((*ids.shape[:-1], embedding_VD.shape[1]), jnp.float32)
    for c in range(ids.shape[-1]):
        rows = jnp.take(embedding_VD, ids[..., c], axis=0, mode="clip").astype(jnp.float32)
        total = total + weights[..., c, None] * rows
    return total


def _weighted_rows_backward(saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[Any, None, None]:
    embedding_VD, ids, weights = saved

    total_VD = jnp.zeros(embedding_VD.shape, jnp.float32)
    for c in range(ids.shape[-1]):
        rows = (weights[..., c, None] * grad).reshape(-1, grad.shape[-1])
        total_VD = total_VD.at[ids[..., c].reshape(-1)].add(rows, mode="drop")
    return total_VD.astype(embedding_VD.dtype), None, None


_weighted_rows.defvjp(
    lambda *arguments: (_weighted_rows(*arguments), arguments),
    _weighted_rows_backward,
)


def cosine_to_anchor(embedding_VD: jax.Array, mixture: Mixture) -> jax.Array:
    """Cosine of each embedded mixture to the row of its first candidate (Appendix E): float32 [...].

    1 for an ordinary token; 0 where either vector is zero.
    """
    anchor = jnp.take(embedding_VD, mixture.ids[..., 0], axis=0, mode="clip").astype(jnp.float32)
    mixed = embed(embedding_VD, mixture).astype(jnp.float32)
    norms = jnp.linalg.norm(anchor, axis=-1) * jnp.linalg.norm(mixed, axis=-1)
    cosine = jnp.sum(anchor * mixed, axis=-1) / jnp.where(norms > 0, norms, 1.0)
    return jnp.clip(cosine, -1.0, 1.0)  # rounding alone can pass 1


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
    ids_BC = jnp.take(table_VC, greedy(logits_BV), axis=0, mode="clip").astype(jnp.int32)
    logits_BC = jnp.take_along_axis(logits_BV, ids_BC, axis=-1, mode="clip").astype(jnp.float32)
    if weights == "probs":
        logits_BC = jnp.exp(logits_BC - log_total(logits_BV)[:, None]) / temperature
    return Mixture(ids_BC, jax.nn.softmax(logits_BC, axis=-1))


def tail_length(until_ids: tuple[int | tuple[int, ...], ...]) -> int:
    """How many recent response tokens `completed` must see: the longest entry; 0 where there is none."""
    return max((len(ids) for ids in _sequences(until_ids)), default=0)


def completed(until_ids: tuple[int | tuple[int, ...], ...], tail_BM: jax.Array) -> jax.Array:
    """bool [B]: whether the newest token of each tail completes an entry of `until_ids`.

    `tail_BM` int32 holds the M ≥ tail_length(until_ids) most recent response tokens, newest last, and -1
    where the response had none yet: so no entry is ever matched across the end of the prompt.
    """
    chex.assert_rank(tail_BM, 2)
    done_B = jnp.zeros(tail_BM.shape[:1], bool)
    for ids in _sequences(until_ids):
        recent = tail_BM[:, tail_BM.shape[1] - len(ids) :]
        entry = jnp.broadcast_to(jnp.asarray(ids, tail_BM.dtype), (tail_BM.shape[0], len(ids)))
        chex.assert_equal_shape([recent, entry])
        done_B = done_B | jnp.all(recent == entry, axis=-1)
    return done_B


def _sequences(until_ids: tuple[int | tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """Every entry as a tuple of ids."""
    return [ids if isinstance(ids, tuple) else (ids,) for ids in until_ids]


def _noise(noise: Noise, rows: jax.Array) -> jax.Array:
    """σ · rms(row) · ε of arXiv 2509.19170, float32 [..., D]; the rms is a constant in the gradient."""
    chex.assert_shape(noise.key_data, (*rows.shape[:-1], 2))
    chex.assert_shape([noise.position, noise.scale], rows.shape[:-1])

    def draw(key_data: jax.Array, position: jax.Array) -> jax.Array:
        # The generator is named: the noise must not change with a process's default generator.
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        return jax.random.normal(jax.random.fold_in(key, position), rows.shape[-1:], jnp.float32)

    for _ in range(noise.position.ndim):
        draw = jax.vmap(draw)
    rms = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(rows), axis=-1)))
    return (noise.scale * rms)[..., None] * draw(noise.key_data, noise.position)
