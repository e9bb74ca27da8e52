"""One search divided over the devices of a mesh, by rows.

Owns the axis that a search runs on. Must not know what is searched.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "rows"


def parts_of(mesh: Mesh | None) -> int:
    """Into how many parts the rows are divided."""
    return 1 if mesh is None else mesh.size


def divided(work: Callable, mesh: Mesh | None) -> Callable:
    """`work(part, embedding_VD, eligible, *by_row)` on every device of `mesh`, with its number as `part`.

    The matrix and its masks go to every device whole. `by_row` and the results are trees of arrays whose
    leading dimension, a multiple of the number of devices, is split. Without a mesh, or on one device,
    `work` runs as part 0 of 1.
    """
    if mesh is None or mesh.size == 1:
        return lambda *arguments: work(jnp.int32(0), *arguments)

    def body(*arguments: Any) -> Any:
        return work(jax.lax.axis_index(AXIS).astype(jnp.int32), *arguments)

    def on_mesh(*arguments: Any) -> Any:
        specs = (P(), P()) + (P(AXIS),) * (len(arguments) - 2)
        flat = _flat(mesh)
        return jax.shard_map(body, mesh=flat, in_specs=specs, out_specs=P(AXIS), check_vma=False)(*arguments)

    return on_mesh


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Whole copies on every device."""
    return None if mesh is None else NamedSharding(mesh, P())


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Within a compiled program: whole copies on every device."""
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(_flat(mesh), P()))


def _flat(mesh: Mesh) -> Mesh:
    """The same devices in the same order along one axis."""
    return Mesh(mesh.devices.reshape(-1), (AXIS,))
