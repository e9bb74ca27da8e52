"""Collectives between the devices of a mesh, inside of `jax.shard_map`: sums, gathers, exchanges.

Owns the collectives and their gradients. Must not know what is split, nor how a mesh is made.

Every device differentiates its own part of a sum over all devices. So a gradient with respect to an array
that several devices hold alike is, on each of them, one term of a sum that is still to be taken. The
transposes of the collectives follow from that: of `sum` another sum, of `gather` a sum of which each device
keeps its part. An axis of one device has no collective at all: the program is that of a single device.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a mesh, and how many devices lie along it."""

    name: str
    size: int = 1

    def place(self) -> jax.Array | int:
        """The place of this device on the axis."""
        return jax.lax.axis_index(self.name) if self.size > 1 else 0

    def sum(self, x: Any) -> Any:
        """The sum over the devices of the axis."""
        return jax.lax.psum(x, self.name) if self.size > 1 else x

    def gather(self, x: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
        """The parts of all devices joined along `dim`, sent in `dtype` (of `x` by default).

        The gradient is summed in float32, and given in the dtype of `x`.
        """
        sent = x.dtype if dtype is None else jnp.dtype(dtype)
        return _gather(x, self.name, dim, sent) if self.size > 1 else x.astype(sent)

    def exchange(self, x: jax.Array, cut: int, join: int) -> jax.Array:
        """`x` cut along one dimension, a part for each device; what a device gets is joined along another."""
        if self.size == 1:
            return x
        return jax.lax.all_to_all(x, self.name, cut, join, tiled=True)

    def own(self, x: jax.Array) -> jax.Array:
        """This device's part of what `gather` along the first dimension gives."""
        length = x.shape[0] // self.size
        return x if self.size == 1 else jax.lax.dynamic_slice_in_dim(x, self.place() * length, length)


def _gather(x: jax.Array, name: str, dim: int, dtype: Any) -> jax.Array:
    of = x.dtype

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x.astype(dtype), name, axis=dim, tiled=True)

    def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
        grad = grad.astype(jnp.float32)
        return (jax.lax.psum_scatter(grad, name, scatter_dimension=dim, tiled=True).astype(of),)

    gather.defvjp(lambda x: (gather(x), None), backward)
    return gather(x)


class Shards(NamedTuple):
    """The axes of a mesh, for the program of one of its devices.

    Attributes:
      data, fsdp: rows of a batch are split over both; parameters over fsdp.
      tensor: heads, feed-forward width and vocabulary are split over it.
      specs: tree like the parameters, of jax.sharding.PartitionSpec; None where nothing is split.
    """

    data: Axis = Axis("data")
    fsdp: Axis = Axis("fsdp")
    tensor: Axis = Axis("tensor")
    specs: Any = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes of more than one device."""
        return tuple(axis for axis in (self.data, self.fsdp, self.tensor) if axis.size > 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of these axes."""
        return tuple(axis.name for axis in self.axes)

    @property
    def of_rows(self) -> tuple[str, ...]:
        """Names of those over which rows are split."""
        return tuple(axis.name for axis in self.axes if axis.name != self.tensor.name)

    def absent(self, spec: Any) -> tuple[str, ...]:
        """Names of the axes whose devices all hold an array of this spec alike."""
        return tuple(axis.name for axis in self.axes if axis.name not in jax.tree.leaves(tuple(spec)))


ALONE = Shards()
