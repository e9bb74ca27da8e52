"""One chunk of tokens against the head: logits, log-probabilities of the targets, entropy.

Owns how the vocabulary is split over devices, where it is. Must not know chunks (logprobs.py), nor the model
below the projection.

On a mesh each device has its own part of the vocabulary and gets the hidden states of all devices along the
fsdp axis: a chunk's hidden states are a hundredth of the head, which otherwise every chunk would gather, and
whose gradient every chunk would sum.

Letters of this file: t tokens of a chunk, v rows of the head on this device, X all tokens as one dimension.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.sampling import scaled
from ngrpo_jax.algo.shards import ALONE, Shards

_NO_TOKEN = float(np.finfo(np.float32).min) / 4  # a logit whose probability is 0, and no NaN times 0


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` tokens, split over the tensor and then the fsdp axis; the last parts may be padding."""

    size: int = 0  # not read where nothing is split
    shards: Shards = ALONE

    @property
    def _block(self) -> int:
        """Tokens of the devices at one place of the tensor axis."""
        return -(-self.size // self.shards.tensor.size)

    @property
    def _part(self) -> int:
        """Tokens of one device."""
        return -(-self._block // self.shards.fsdp.size)

    def rows(self, head_VD: jax.Array) -> jax.Array:
        """The rows of this device's tokens, [v, D], from the head as the parameters are split."""
        fsdp, tensor = self.shards.fsdp, self.shards.tensor
        if tensor.size > 1 and len(head_VD) == self.size:  # an axis that does not divide V splits nothing
            whole_VD = _padded(head_VD, self._block * tensor.size)
            head_VD = jax.lax.dynamic_slice_in_dim(whole_VD, tensor.place() * self._block, self._block)
        if fsdp.size == 1:
            return head_VD
        return fsdp.exchange(_padded(head_VD, self._part * fsdp.size), cut=0, join=1)

    def logprobs_and_entropy(
        self,
        hidden_BtD: jax.Array,
        rows_vD: jax.Array,
        targets_Bt: jax.Array,
        temperature: float | jax.Array,
        *,
        entropy: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """float32 [B, t] each, of this device's tokens; `entropy` false: zeros in its place."""
        fsdp = self.shards.fsdp
        logits_Btv = scaled(project(fsdp.gather(hidden_BtD, 0), rows_vD), temperature)
        if not (fsdp.size > 1 or self.shards.tensor.size > 1):
            return _of_logits(logits_Btv, targets_Bt, lambda x: x, lambda x: x, entropy=entropy)
        place = self.shards.tensor.place(), fsdp.place()
        first = place[0] * self._block + place[1] * self._part
        columns_Bt = fsdp.gather(targets_Bt, 0) - first
        if self._part * fsdp.size * self.shards.tensor.size != self.size:
            ids_v = first + jnp.arange(rows_vD.shape[0])
            last = jnp.minimum((place[0] + 1) * self._block, self.size)
            logits_Btv = jnp.where(ids_v < last, logits_Btv, _NO_TOKEN)
            # Padding has the numbers of tokens that the next device has.
            columns_Bt = jnp.where(columns_Bt < last - first, columns_Bt, -1)
        names = tuple(axis.name for axis in self.shards.axes if axis.name != self.shards.data.name)
        results = _of_logits(
            logits_Btv,
            columns_Bt,
            lambda x: jax.lax.psum(x, names),
            lambda x: jax.lax.pmax(x, names),
            entropy=entropy,
        )
        return fsdp.own(results[0]), fsdp.own(results[1])


WHOLE = Vocabulary()


def _padded(x_VD: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x_VD, ((0, rows - len(x_VD)), (0, 0)))


def _of_logits(logits_Btv, targets_Bt, total, largest, *, entropy):
    """Log-probabilities and entropy of a softmax over all devices' columns.

    `total` and `largest` join what each device has of its own; `targets_Bt` are columns, of this device where
    they are from 0 to v - 1.
    """
    high_Bt1 = largest(jax.lax.stop_gradient(jnp.max(logits_Btv, axis=-1, keepdims=True)))
    shifted_Btv = logits_Btv - high_Bt1
    exp_Btv = jnp.exp(shifted_Btv)
    total_Bt = total(jnp.sum(exp_Btv, axis=-1))
    log_total_Bt = jnp.log(total_Bt)
    ids_Btv = jax.lax.broadcasted_iota(jnp.int32, shifted_Btv.shape, 2)
    target_Bt = total(jnp.sum(jnp.where(ids_Btv == targets_Bt[..., None], shifted_Btv, 0.0), axis=-1))
    if not entropy:
        return target_Bt - log_total_Bt, jnp.zeros_like(log_total_Bt)
    entropy_Bt = log_total_Bt - total(jnp.sum(exp_Btv * shifted_Btv, axis=-1)) / total_Bt
    return target_Bt - log_total_Bt, entropy_Bt


@jax.custom_vjp
def project(hidden_BtD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """float32 logits [B, t, V]. The gradient is written out to keep its two products in hidden's dtype:
    autodiff would multiply float32 by float32, which takes several times as long on an accelerator."""
    return jnp.einsum(
        "btd,vd->btv", hidden_BtD, head_VD.astype(hidden_BtD.dtype), preferred_element_type=jnp.float32
    )


def _project_forward(hidden_BtD: jax.Array, head_VD: jax.Array):
    return project(hidden_BtD, head_VD), (hidden_BtD, head_VD)


def _project_backward(saved: tuple[jax.Array, jax.Array], grad_BtV: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden_BtD, head_VD = saved
    dtype = hidden_BtD.dtype
    grad_BtV = grad_BtV.astype(dtype)
    to_hidden = jnp.einsum("btv,vd->btd", grad_BtV, head_VD.astype(dtype), preferred_element_type=jnp.float32)
    # As matrices: for a sum over two dimensions XLA's CPU backend transposes the gradient entry by entry.
    grad_XV, hidden_XD = (x.reshape(-1, x.shape[-1]) for x in (grad_BtV, hidden_BtD))
    to_head = jnp.einsum("xv,xd->vd", grad_XV, hidden_XD, preferred_element_type=jnp.float32)
    return to_hidden.astype(dtype), to_head.astype(head_VD.dtype)


project.defvjp(_project_forward, _project_backward)
