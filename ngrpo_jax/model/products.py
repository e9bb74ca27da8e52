"""The two products of a layer whose gradients are written out: activations × weights, and SwiGLU.

Autodiff's gradient of a weight is the transpose of (gradientᵀ · input). For it XLA's CPU backend makes a
transposed copy of the gradient, and fuses the arithmetic before it into that copy, where it is repeated with
strided reads: a third of a small model's update. Written as inputᵀ · gradient it needs no copy. On
accelerators both are one call of the same matrix product. Must not know the layers that use them.

X is all leading dimensions as one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Remat policies do not recognise a product inside of a custom gradient; this name marks its result for them.
NAME = "dense_product"
# A kernel with so many times more inputs than outputs has its gradient from gradientᵀ · input: on a CPU the
# transposed copy is then of little, and the product a third to a half of the time.
NARROW = 8


class Adapter(NamedTuple):
    """What an adapter (lora.py) adds to a product: `scale` · `low` B.

    Attributes:
      low: x A, of `low_rank_products`, [X, R].
      b: [R, outputs..].
    """

    low: jax.Array
    b: jax.Array
    scale: float


def low_rank_products(x: jax.Array, factors: Sequence[jax.Array], contracted: int) -> list[jax.Array]:
    """x A for the first factors A [inputs.., R] of several adapters, [X, R] each, by one product.

    Narrow products take the time of reading `x`, which is read once so, and once for all their gradients.
    """
    width = math.prod(factors[0].shape[:contracted])
    joined = jnp.concatenate([factor.reshape(width, -1) for factor in factors], axis=1)
    low = checkpoint_name(_matmul(x.reshape(-1, width), joined, 1), NAME)
    return jnp.split(low, len(factors), axis=1)


def dense_product(
    x: jax.Array, kernel: jax.Array, contracted: int, adapter: Adapter | None = None
) -> jax.Array:
    """The last `contracted` axes of `x` times the first of `kernel`; with an adapter x W + s (x A) B.

    W + s A B is never formed. Where the kernel is not trained, its gradient is dead code, which XLA removes.
    """
    out = _matmul(x, kernel, contracted)
    if adapter is not None:
        out = out + _matmul(adapter.low, adapter.scale * adapter.b, 1)
    return checkpoint_name(out.reshape(*x.shape[: x.ndim - contracted], *kernel.shape[contracted:]), NAME)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, elementwise; only the two arguments are saved for the backward pass."""
    return nn.silu(gate) * up


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without the barriers XLA would store the sigmoid to share it between the passes and between the two
    # results. On a CPU reading it takes longer than an exponential, and it would take two arrays a layer.
    gate, up = jax.lax.optimization_barrier(saved)
    again = jax.lax.optimization_barrier(gate)
    sigmoid = jax.nn.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * again * jax.nn.sigmoid(again)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _matmul(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
    """[X, F] of x [.., inputs..] and a kernel [inputs.., outputs..], both taken as matrices."""

    def matrices(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        width = math.prod(kernel.shape[:contracted])
        return x.reshape(-1, width), kernel.reshape(width, -1)

    @jax.custom_vjp
    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.dot(*matrices(x, kernel))

    def forward(x: jax.Array, kernel: jax.Array):
        # The kernel as it is stored: within a scan over layers another shape of it would be a copy.
        return multiply(x, kernel), (x, kernel)

    def backward(saved: tuple[jax.Array, jax.Array], grad_XF: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_XD, kernel_DF = matrices(*saved)
        to_x = jax.lax.dot_general(grad_XF, kernel_DF, (((1,), (1,)), ((), ())))
        if NARROW * kernel_DF.shape[1] <= kernel_DF.shape[0]:
            to_kernel = jax.lax.dot_general(grad_XF, x_XD, (((0,), (0,)), ((), ()))).T
        else:
            to_kernel = jax.lax.dot_general(x_XD, grad_XF, (((0,), (0,)), ((), ())))
        return to_x.reshape(saved[0].shape), to_kernel.reshape(saved[1].shape)

    multiply.defvjp(forward, backward)
    return multiply(x, kernel)
