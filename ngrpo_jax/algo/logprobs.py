"""Hidden states to the log-probabilities of given tokens, without the [B, T, V] logits between them.

Owns the chunks of the projection and that only response tokens are projected.
Must not know the model below the projection, mixtures, or what is done with a log-probability.

Letters of this file: Z chunks, t tokens of a chunk, X all tokens of a chunk as one dimension.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ngrpo_jax.algo.vocabulary import WHOLE, Vocabulary


def token_logprobs(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    temperature: float | jax.Array,
    *,
    chunk: int = 1024,
    response_mask_BT: jax.Array | None = None,
    entropy: bool = True,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden · headᵀ / temperature) at the targets, and the entropy of that distribution in nats.

    Returns float32 ([B, T], [B, T]). About `chunk` tokens are projected at a time, forward and, by
    recomputation, backward: memory grows with chunk · V and not with B · T · V. Chunks run along T, so that
    a batch sharded over B stays so; no gather runs along V, so that `head_VD` may be sharded over V.
    With `response_mask_BT`, bool, only the tokens where it is true are projected, and the others get 0 and 0:
    the tokens to project are moved to the front of their rows, and chunks in which no row has any are
    skipped. With `entropy` false the second result is 0 and costs nothing.

    With `vocabulary`, `head_VD` is what this device of a mesh has of the head, as its parameters are split.

    Products are in the dtype of `hidden_BTD` with float32 sums. The gradient for `head_VD` is summed over
    chunks in the dtype of `head_VD`: pass the float32 master, of which each chunk makes its own cast.
    """
    head_VD = vocabulary.rows(head_VD)
    _check(hidden_BTD, head_VD, targets_BT)
    if response_mask_BT is not None:
        order_BT, place_BT = _responses_first(response_mask_BT)
        hidden_BTD, targets_BT = _permuted(hidden_BTD, order_BT, place_BT), _take(targets_BT, order_BT)

    # Saving nothing but its inputs, a chunk is projected anew in the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(hidden_BtD: jax.Array, targets_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        return vocabulary.logprobs_and_entropy(hidden_BtD, head_VD, targets_Bt, temperature, entropy=entropy)

    def of_chunk(_: None, needed: jax.Array, hidden_BtD: jax.Array, targets_Bt: jax.Array):
        if response_mask_BT is None:
            return None, one_chunk(hidden_BtD, targets_Bt), ()
        zeros = jnp.zeros(targets_Bt.shape, jnp.float32)
        return None, jax.lax.cond(needed, one_chunk, lambda *_: (zeros, zeros), hidden_BtD, targets_Bt), ()

    most = targets_BT.shape[1] if response_mask_BT is None else _most(response_mask_BT, vocabulary)
    _, results, _ = _over_chunks(of_chunk, None, (hidden_BTD, targets_BT), chunk, most)
    if response_mask_BT is not None:
        results = tuple(jnp.where(response_mask_BT, _take(x, place_BT), 0.0) for x in results)
    return results


# (logprobs [B, t], entropy [B, t], response mask [B, t], inputs of [B, t, ...]) -> (sum over tokens, metrics)
TokenLoss = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def token_loss(
    loss: TokenLoss,
    temperature: float,
    *,
    vocabulary: Vocabulary = WHOLE,
    chunk: int = 1024,
    train_head: bool = True,
) -> Callable[..., Any]:
    """A loss that each token has for itself, as a function of hidden states for which logits exist once.

    Where `token_logprobs` must project a second time in the backward pass, here the gradient of a chunk is
    taken while its logits exist: three products a token rather than four, and the memory is still that of
    one chunk. So the loss may not join tokens of different chunks (a ratio for each sequence does).

    Args:
      loss: sums over the tokens of a chunk, which keep their order within a row; tokens outside of the mask
        may not count. Its metrics are a tree of scalars.
      temperature, vocabulary, chunk: as for `token_logprobs`.
      train_head: false: `head_VD` has no gradient, nor the product and the memory that it would take.

    Returns:
      (hidden_BTD, head_VD, targets_BT, response_mask_BT, loss_inputs) -> (value, metrics): the loss summed
      over chunks, with gradients for `hidden_BTD` and `head_VD`, and metrics with a leading dimension of
      chunks. `loss_inputs` is a tree of arrays [B, T, ...], without gradient. Chunks with no token in the
      mask are not projected.
    """

    def of_chunk(hidden_BtD, head_VD, targets_Bt, mask_Bt, inputs_Bt):
        results = vocabulary.logprobs_and_entropy(hidden_BtD, head_VD, targets_Bt, temperature)
        return loss(*results, mask_Bt, inputs_Bt)

    def of_empty(targets_Bt, mask_Bt, inputs_Bt):
        zeros = jnp.zeros(targets_Bt.shape, jnp.float32)
        return loss(zeros, zeros, jnp.zeros_like(mask_Bt), inputs_Bt)

    def values(hidden_BTD, head_VD, given):
        def step(total, needed, hidden_BtD, *rest):
            value, metrics = jax.lax.cond(
                needed,
                lambda h, *rest: of_chunk(h, head_VD, *rest),
                lambda h, *rest: of_empty(*rest),
                hidden_BtD,
                *rest,
            )
            return total + value, (), metrics

        tokens, most = (hidden_BTD, *given), _most(given[1], vocabulary)
        total, _, metrics = _over_chunks(step, jnp.float32(0), tokens, chunk, most)
        return total, metrics

    def values_and_gradients(hidden_BTD, head_VD, given):
        def full(to_head_VD, hidden_BtD, *rest):
            argnums = (0, 1) if train_head else (0,)
            gradient = jax.value_and_grad(of_chunk, argnums=argnums, has_aux=True)
            (value, metrics), (to_hidden, *to_head) = gradient(hidden_BtD, head_VD, *rest)
            return jax.tree.map(jnp.add, to_head_VD, to_head), value, metrics, to_hidden

        def empty(to_head_VD, hidden_BtD, *rest):
            return to_head_VD, *of_empty(*rest), jnp.zeros_like(hidden_BtD)

        def step(carry, needed, *rest):
            total, to_head_VD = carry
            to_head_VD, value, metrics, to_hidden = jax.lax.cond(needed, full, empty, to_head_VD, *rest)
            return (total + value, to_head_VD), to_hidden, metrics

        tokens, most = (hidden_BTD, *given), _most(given[1], vocabulary)
        start = jnp.float32(0), [jnp.zeros_like(head_VD)] if train_head else []
        (total, to_head_VD), to_hidden, metrics = _over_chunks(step, start, tokens, chunk, most)
        return (total, metrics), (to_hidden, *to_head_VD)

    def scaled_gradients(gradients, grad):
        to_hidden, *to_head = (grad[0].astype(g.dtype) * g for g in gradients)
        return to_hidden, to_head[0] if train_head else None, None

    summed = jax.custom_vjp(values)
    summed.defvjp(values_and_gradients, scaled_gradients)

    def from_hidden(hidden_BTD, head_VD, targets_BT, response_mask_BT, loss_inputs):
        head_VD = vocabulary.rows(head_VD)
        _check(hidden_BTD, head_VD, targets_BT)
        order_BT, place_BT = _responses_first(response_mask_BT)
        given = jax.tree.map(lambda x: _take(x, order_BT), (targets_BT, response_mask_BT, loss_inputs))
        return summed(_permuted(hidden_BTD, order_BT, place_BT), head_VD, given)

    return from_hidden


def _check(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> None:
    chex.assert_rank([hidden_BTD, head_VD, targets_BT], [3, 2, 2])
    chex.assert_shape(targets_BT, hidden_BTD.shape[:2])
    chex.assert_shape(head_VD, (None, hidden_BTD.shape[2]))


def _over_chunks(step: Callable, carry: Any, tokens_BT: Any, chunk: int, most: int | jax.Array) -> Any:
    """Scans tokens [B, T, ...], about `chunk` of all rows together at a time; a shorter chunk ends it.

    Args:
      step: (carry, needed, *tokens [B, t, ...]) -> (carry, results a token [B, t, ...], results a chunk).
      most: `needed` is whether a chunk starts before the `most`-th token of the rows.

    Returns:
      carry, results a token [B, T, ...], and results a chunk [chunks, ...].
    """
    batch, time = jax.tree.leaves(tokens_BT)[0].shape[:2]
    length = min(time, max(1, chunk // batch))
    count = time // length
    whole = count * length

    def split(x_BT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BT[:, :whole].reshape(batch, count, length, *x_BT.shape[2:]), 1, 0)

    def join(x_ZBt: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_ZBt, 0, 1).reshape(batch, whole, *x_ZBt.shape[3:])

    def scanned(carry: Any, xs: Any) -> Any:
        carry, of_tokens, of_chunk = step(carry, *xs)
        return carry, (of_tokens, of_chunk)

    needed_Z = jnp.arange(count) * length < most
    carry, (of_tokens, of_chunk) = jax.lax.scan(scanned, carry, (needed_Z, *jax.tree.map(split, tokens_BT)))
    of_tokens = jax.tree.map(join, of_tokens)
    if whole < time:
        rest = jax.tree.map(lambda x_BT: x_BT[:, whole:], tokens_BT)
        carry, of_rest, of_last = step(carry, whole < most, *rest)
        of_tokens = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), of_tokens, of_rest)
        of_chunk = jax.tree.map(lambda x, y: jnp.append(x, y[None], axis=0), of_chunk, of_last)
    return carry, of_tokens, of_chunk


def _responses_first(response_mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The permutation that moves each row's response tokens to the front and keeps orders, int32 [B, T].

    (which token comes to each place, the place of each token). By counting, without a sort, which takes half
    a minute to compile for a long row on a TPU.
    """
    counts_BT = jnp.cumsum(response_mask_BT, axis=1, dtype=jnp.int32)
    tokens_BT = jnp.broadcast_to(jnp.arange(counts_BT.shape[1], dtype=jnp.int32)[None], counts_BT.shape)
    place_BT = jnp.where(response_mask_BT, counts_BT - 1, counts_BT[:, -1:] + tokens_BT - counts_BT)
    order_BT = jnp.put_along_axis(place_BT, place_BT, tokens_BT, axis=1, inplace=False, mode="drop")
    return order_BT, place_BT


def _most(response_mask_BT: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """The most response tokens of any row, on any device: all of them compute a chunk, or none."""
    most, names = jnp.max(jnp.sum(response_mask_BT, axis=1)), vocabulary.shards.names
    return jax.lax.pmax(most, names) if names else most


def _take(x_BT: jax.Array, order_BT: jax.Array) -> jax.Array:
    index = order_BT.reshape(*order_BT.shape, *(1,) * (x_BT.ndim - 2))
    return jnp.take_along_axis(x_BT, index, axis=1, mode="clip")


@jax.custom_vjp
def _permuted(x_BTD: jax.Array, order_BT: jax.Array, place_BT: jax.Array) -> jax.Array:
    """`_take` by a permutation and its inverse, whose gradient is another look-up rather than a scatter."""
    return _take(x_BTD, order_BT)


_permuted.defvjp(
    lambda x_BTD, order_BT, place_BT: (_take(x_BTD, order_BT), place_BT),
    lambda place_BT, grad: (_take(grad, place_BT), None, None),
)
