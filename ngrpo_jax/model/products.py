"""The two products of a layer whose gradients are written out: activations × weights, and SwiGLU.

Autodiff's gradient of a weight is the transpose of (gradientᵀ · input). For it XLA's CPU backend makes a
transposed copy of the gradient, and fuses the arithmetic before it into that copy, where it is repeated with
strided reads: a third of a small model's update. Written as inputᵀ · gradient it needs no copy. On
accelerators both are one call of the same matrix product. Must not know the layers that use them.

X is all leading dimensions as one.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Remat policies do not recognise a product inside of a custom gradient; this name marks its result for them.
NAME = "dense_product"


def dense_product(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **_: Any
) -> jax.Array:
    """`jax.lax.dot_general` of the last axes of `x` with the first of `kernel`; for `nn.Dense`."""
    (contracted, _), _ = dimension_numbers
    count = len(contracted)
    width = math.prod(kernel.shape[:count])
    out = _matmul(x.reshape(-1, width), kernel.reshape(width, -1), precision)
    return checkpoint_name(out.reshape(*x.shape[: x.ndim - count], *kernel.shape[count:]), NAME)


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


def _matmul(x_XD: jax.Array, kernel_DF: jax.Array, precision: Any) -> jax.Array:
    @jax.custom_vjp
    def multiply(x_XD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
        return jnp.dot(x_XD, kernel_DF, precision=precision)

    def forward(x_XD: jax.Array, kernel_DF: jax.Array):
        return multiply(x_XD, kernel_DF), (x_XD, kernel_DF)

    def backward(saved: tuple[jax.Array, jax.Array], grad_XF: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_XD, kernel_DF = saved
        to_x = jax.lax.dot_general(grad_XF, kernel_DF, (((1,), (1,)), ((), ())), precision=precision)
        to_kernel = jax.lax.dot_general(x_XD, grad_XF, (((0,), (0,)), ((), ())), precision=precision)
        return to_x, to_kernel

    multiply.defvjp(forward, backward)
    return multiply(x_XD, kernel_DF)
