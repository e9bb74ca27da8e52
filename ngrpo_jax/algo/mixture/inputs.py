"""`Mixture`, the one kind of input that the model takes, and how it is embedded.

Owns the type and its embedding, which rollout and replay share. Must not know how a mixture came about.

A mixture is C token ids with weights that sum to 1. An ordinary token o is the mixture ([o, o, ...],
[1, 0, ...]), so GRPO is N-GRPO at mixing rate 0 and both take one path through the code.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.shards import ALONE, Shards


class Noise(NamedTuple):
    """What Gaussian noise on an embedding is recomputed from: storing the noise itself would take [..., D].

    The noise depends on these three alone, so it is the same wherever the token is placed in a packed row
    and however the arrays are sharded.

    Attributes:
      key_data: uint32 [..., 2], data of the sequence's threefry key for noise.
      position: int32 [...], index of the token in its response.
      scale: float32 [...], standard deviation as a multiple of the root mean square of the embedding row;
        0 leaves the row as it is.
    """

    key_data: Any  # jax.Array, or np.ndarray in a trajectory on the host
    position: Any
    scale: Any


class Mixture(NamedTuple):
    """Model inputs: `ids` int32 [..., C] and `weights` float32 [..., C] that sum to 1 over C.

    `noise`, over the same leading dimensions, belongs to the noise strategy (arXiv 2509.19170) alone.
    """

    ids: Any
    weights: Any
    noise: Noise | None = None


def one_hot(ids: jax.Array | np.ndarray, size: int) -> Mixture:
    """Ordinary tokens as mixtures: ids [...] -> Mixture [..., size], all weight on the first candidate.

    The candidates of weight 0 repeat the token, so that `embed` reads no other row for them.
    """
    shape = (*np.shape(ids), size)
    weights = jnp.zeros(shape, jnp.float32).at[..., 0].set(1.0)
    return Mixture(jnp.broadcast_to(jnp.asarray(ids, jnp.int32)[..., None], shape), weights)


def embed(
    embedding_VD: jax.Array, mixture: Mixture, *, size: int | None = None, shards: Shards = ALONE
) -> jax.Array:
    """(10): Σ_c weights[..., c] · E[ids[..., c]] plus any noise: [..., D] in the embedding's dtype.

    In the gradient the weights are constants and E is not: each candidate's row gets its share (§3.3). Sums
    are in float32, and an ordinary token embeds to exactly its row. Candidates are added one at a time, so
    that [..., C, D] is never formed.

    On a device of a mesh `embedding_VD` is its part of `size` rows, split over tensor, and of D, over fsdp.
    Each device looks up, in the columns that it has, the tokens of all devices along fsdp, which then get
    the columns of their own tokens: neither rows nor their gradient travel.
    """
    chex.assert_rank(embedding_VD, 2)
    chex.assert_equal_shape([mixture.ids, mixture.weights])
    fsdp, tensor = shards.fsdp, shards.tensor
    ids, weights = (fsdp.gather(x, 0) for x in (mixture.ids, mixture.weights.astype(jnp.float32)))
    split = tensor.size > 1 and len(embedding_VD) != size
    if split:
        ids = ids - tensor.place() * len(embedding_VD)
        weights = jnp.where((ids >= 0) & (ids < len(embedding_VD)), weights, 0.0)
    total = _weighted_rows(embedding_VD, ids, weights)
    if split:
        total = tensor.sum(total)
    total = fsdp.exchange(total, cut=0, join=total.ndim - 1)
    if mixture.noise is not None:
        total = total + _noise(mixture.noise, total)
    return total.astype(embedding_VD.dtype)


def cosine_to_anchor(embedding_VD: jax.Array, mixture: Mixture) -> jax.Array:
    """Cosine of each embedded mixture and the row of its first candidate (Appendix E): float32 [...].

    1 for an ordinary token; 0 where either vector is zero.
    """
    anchor = jnp.take(embedding_VD, mixture.ids[..., 0], axis=0, mode="clip").astype(jnp.float32)
    mixed = embed(embedding_VD, mixture).astype(jnp.float32)
    norms = jnp.linalg.norm(anchor, axis=-1) * jnp.linalg.norm(mixed, axis=-1)
    cosine = jnp.sum(anchor * mixed, axis=-1) / jnp.where(norms > 0, norms, 1.0)
    return jnp.clip(cosine, -1.0, 1.0)  # rounding can take a cosine past 1


@jax.custom_vjp
def _weighted_rows(embedding_VD: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 Σ_c weights[..., c] · E[ids[..., c]].

    The gradient is written out so that all candidates are added into one [V, D] instead of one each.
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


_weighted_rows.defvjp(lambda *arguments: (_weighted_rows(*arguments), arguments), _weighted_rows_backward)


def _noise(noise: Noise, rows: jax.Array) -> jax.Array:
    """σ · rms(row) · ε of arXiv 2509.19170, float32 [..., D]; the rms is a constant in the gradient."""
    chex.assert_shape(noise.key_data, (*rows.shape[:-1], 2))
    chex.assert_shape([noise.position, noise.scale], rows.shape[:-1])

    def normal(key_data: jax.Array, position: jax.Array) -> jax.Array:
        # The generator is named, because noise must not change with a process's default generator.
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        return jax.random.normal(jax.random.fold_in(key, position), rows.shape[-1:], jnp.float32)

    for _ in range(noise.position.ndim):
        normal = jax.vmap(normal)
    rms = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(rows), axis=-1)))
    return (noise.scale * rms)[..., None] * normal(noise.key_data, noise.position)
