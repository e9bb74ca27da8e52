"""Hidden states to the log-probabilities of given tokens, without the [B, T, V] logits between them.

Owns: the chunked projection, its backward pass, the entropy. Must not know: the model above the projection,
mixtures, which positions count.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from ngrpo_jax.algo.sampling import scaled


def token_logprobs(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    temperature: float | jax.Array,
    *,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden · head / temperature) at the targets, and the entropy of that law in nats.

    Returns float32 ([B, T], [B, T]). About `chunk` tokens are projected at a time, forward and, by
    recomputation, backward: memory grows with chunk · V and not with B · T · V. Chunks run along T, so that
    a batch sharded over B stays so; no gather runs along V, so that `head_DV` may be sharded over V.

    Products are in the dtype of `hidden_BTD` with float32 sums. The gradient for `head_DV` is summed over
    chunks in the dtype of `head_DV`: pass the float32 master, of which each chunk makes its own cast.
    """
    chex.assert_rank([hidden_BTD, head_DV, targets_BT], [3, 2, 2])
    batch, time, width = hidden_BTD.shape
    chex.assert_shape(targets_BT, (batch, time))
    chex.assert_shape(head_DV, (width, None))
    chunks = -(-time // max(1, chunk // batch))
    length = -(-time // chunks)
    pad = chunks * length - time

    # Saving nothing but its inputs, a chunk is projected anew in the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(hidden_BtD: jax.Array, targets_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _logprobs_and_entropy(scaled(_project(hidden_BtD, head_DV), temperature), targets_Bt)

    hidden_NBtD = _split_time(jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))), chunks)
    targets_NBt = _split_time(jnp.pad(targets_BT, ((0, 0), (0, pad))), chunks)
    _, parts_NBt = jax.lax.scan(lambda _, xs: (None, one_chunk(*xs)), None, (hidden_NBtD, targets_NBt))
    logprobs_BT, entropy_BT = (
        jnp.moveaxis(x, 0, 1).reshape(batch, chunks * length)[:, :time] for x in parts_NBt
    )
    return logprobs_BT, entropy_BT


def _logprobs_and_entropy(logits_BtV: jax.Array, targets_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    shifted_BtV = logits_BtV - jax.lax.stop_gradient(jnp.max(logits_BtV, axis=-1, keepdims=True))
    exp_BtV = jnp.exp(shifted_BtV)
    total_Bt = jnp.sum(exp_BtV, axis=-1)
    log_total_Bt = jnp.log(total_Bt)
    ids_BtV = jax.lax.broadcasted_iota(jnp.int32, shifted_BtV.shape, 2)
    target_Bt = jnp.sum(jnp.where(ids_BtV == targets_Bt[..., None], shifted_BtV, 0.0), axis=-1)
    entropy_Bt = log_total_Bt - jnp.sum(exp_BtV * shifted_BtV, axis=-1) / total_Bt
    return target_Bt - log_total_Bt, entropy_Bt


def _split_time(x_BT: jax.Array, chunks: int) -> jax.Array:
    """[B, n·t, ...] -> [n, B, t, ...]."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], chunks, -1, *x_BT.shape[2:]), 1, 0)


@jax.custom_vjp
def _project(hidden_BtD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits [B, t, V]. The gradient is written out to keep its two products in hidden's dtype:
    left to itself it would multiply float32 by float32, several times the price on an accelerator."""
    return jnp.einsum(
        "btd,dv->btv", hidden_BtD, head_DV.astype(hidden_BtD.dtype), preferred_element_type=jnp.float32
    )


def _project_forward(hidden_BtD: jax.Array, head_DV: jax.Array):
    return _project(hidden_BtD, head_DV), (hidden_BtD, head_DV)


def _project_backward(saved: tuple[jax.Array, jax.Array], grad_BtV: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden_BtD, head_DV = saved
    dtype = hidden_BtD.dtype
    grad_BtV = grad_BtV.astype(dtype)
    to_hidden = jnp.einsum("btv,dv->btd", grad_BtV, head_DV.astype(dtype), preferred_element_type=jnp.float32)
    to_head = jnp.einsum("btd,btv->dv", hidden_BtD, grad_BtV, preferred_element_type=jnp.float32)
    return to_hidden.astype(dtype), to_head.astype(head_DV.dtype)


_project.defvjp(_project_forward, _project_backward)
