"""The device mesh, and where each array lives on it.

Owns the three mesh axes and the one table from parameter path to PartitionSpec. Must not know what the
parameters mean, how a step is computed, or any config object: a sharding goes to the other rooms as an
argument.

Axes, outermost first:
    data    whole copies of the learner's state; rows of a batch are split over it
    fsdp    parameters and optimiser state are split over it, rows of a batch as well
    tensor  heads, feed-forward width and vocabulary are split over it
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ngrpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Path of a parameter -> its dimension letters and the mesh axis of each. Layer leaves are written without
# their leading [L]: it is never split, because a scan over layers slices it at every layer.
# Norms and the q/k norms are a few kilobytes: gathering them would cost more than holding them everywhere.
RULES: tuple[tuple[str, str, P], ...] = (
    (r"embed/embedding", "VD", P("tensor", "fsdp")),
    (r"head/rows", "VD", P("tensor", "fsdp")),
    (r"final_norm/scale", "D", P(None)),
    (r"LAYER/(input_norm|post_attention_norm)/scale", "D", P(None)),
    (r"LAYER/attention/q/kernel", "DNH", P("fsdp", "tensor", None)),
    (r"LAYER/attention/[kv]/kernel", "DKH", P("fsdp", "tensor", None)),
    (r"LAYER/attention/q/bias", "NH", P("tensor", None)),
    (r"LAYER/attention/[kv]/bias", "KH", P("tensor", None)),
    (r"LAYER/attention/[qk]_norm/scale", "H", P(None)),
    (r"LAYER/attention/o/kernel", "NHD", P("tensor", None, "fsdp")),
    (r"LAYER/mlp/(gate|up)/kernel", "DF", P("fsdp", "tensor")),
    (r"LAYER/mlp/down/kernel", "FD", P("tensor", "fsdp")),
)
# The same for parameters laid out for the rollout (model/columns.py), whose names and orders are others.
ROLLOUT_RULES: tuple[tuple[str, str, P], ...] = (
    (r"LAYER/attention/qkv/kernel", "KJHD", P("tensor", None, None, None)),
    (r"LAYER/attention/qkv/bias", "KJH", P("tensor", None, None)),
    (r"LAYER/attention/o/kernel", "DKGH", P(None, "tensor", None, None)),
    (r"LAYER/mlp/gate_up/kernel", "2FD", P(None, "tensor", None)),
    (r"LAYER/mlp/down/kernel", "DF", P(None, "tensor")),
)
# `layers/...` holds stacked leaves [L, ...]; `layers/7/...` holds those of layer 7 alone (rollout layout).
_LAYER = r"layers(?P<index>/\d+)?"


def _compiled(rules: tuple[tuple[str, str, P], ...]) -> tuple[tuple[re.Pattern, str, P], ...]:
    return tuple(
        (re.compile(r"(?:^|/)" + pattern.replace("LAYER", _LAYER) + "$"), letters, spec)
        for pattern, letters, spec in rules
    )


_TABLES = {
    "learner": _compiled(RULES),
    "tensor": _compiled(ROLLOUT_RULES + RULES),
    "replicated": _compiled(ROLLOUT_RULES + RULES),
}
_DIMENSIONS = {
    "V": "vocabulary rows",
    "D": "model width",
    "N": "query heads",
    "K": "key/value heads",
    "H": "head size",
    "F": "feed-forward width",
    "J": "query heads, key and value of a key/value head",
    "G": "query heads of a key/value head",
    "2": "matrices",
    "L": "layers",
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (of every host), or of `devices`.

    All axes are Auto: shardings are given at the edges of a jitted program and XLA finds the rest. Devices
    along the tensor axis belong to one host, because each host's rollout runs on its own devices alone.

    Raises:
        ValueError: a size below 1, sizes whose product is not the number of devices, or a tensor axis that
            does not divide the devices of a host.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}; a mesh axis has at least one device")
    if math.prod(sizes.values()) != len(devices):
        product = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"{product} = {math.prod(sizes.values())}, but there are {len(devices)} devices; "
            f"choose mesh.data, mesh.fsdp and mesh.tensor whose product is {len(devices)}"
        )
    auto = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)
    hosts = collections.Counter(device.process_index for device in devices)
    if len(hosts) == 1:
        return mesh
    if len(set(hosts.values())) > 1 or next(iter(hosts.values())) % tensor:
        counts = ", ".join(f"process {index} has {count}" for index, count in sorted(hosts.items()))
        raise UserError(
            f"mesh.tensor {tensor} does not divide the devices of every host alike ({counts}); the rollout "
            "of a host runs on its own devices, so choose mesh.tensor that divides them"
        )
    rows = mesh.devices.reshape(-1, tensor)
    if all(len({device.process_index for device in row}) == 1 for row in rows):
        return mesh
    # The order that suits the wires best lets a tensor group span hosts: here the hosts come first.
    ordered = np.array(sorted(devices, key=lambda device: (device.process_index, device.id)))
    return Mesh(ordered.reshape(data, fsdp, tensor), AXES, axis_types=auto)


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's part of a mesh as a mesh, data × 1 × tensor; the mesh itself where it has all of it."""
    own = jax.process_index()
    if all(device.process_index == own for device in mesh.devices.flat):
        return mesh
    tensor = mesh.shape["tensor"]
    rows = [row for row in mesh.devices.reshape(-1, tensor) if row[0].process_index == own]
    return Mesh(np.array(rows).reshape(len(rows), 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process has, on the devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def lay_out(tree: Any, shardings: Any) -> Any:
    """Arrays on the devices, laid out anew on the same devices. A collective: every process calls it."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_put(tree, shardings)
    return jax.tree.map(lambda leaf, to: jax.jit(_identity, out_shardings=to)(leaf), tree, shardings)


def on_this_host(tree: Any, shardings: Any) -> Any:
    """A copy for this process's devices alone, laid out by shardings that do not split over data and fsdp.

    A collective: every process calls it. With one process this is `lay_out`.
    """
    laid_out = lay_out(tree, shardings)
    leaves = jax.tree.leaves(shardings)
    local = local_mesh(leaves[0].mesh)
    if local is leaves[0].mesh:
        return laid_out

    def own_part(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        here = NamedSharding(local, sharding.spec)
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        devices = here.addressable_devices_indices_map(leaf.shape)
        return jax.make_array_from_single_device_arrays(leaf.shape, here, [parts[d] for d in devices])

    return jax.tree.map(own_part, laid_out, shardings)


def to_host(leaf: Any) -> np.ndarray:
    """A whole array as NumPy. A collective: every process calls it, and gets it."""
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = lay_out(leaf, replicated(leaf.sharding.mesh))
    return np.asarray(leaf)


def _identity(leaf: jax.Array) -> jax.Array:
    return leaf


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as `layers/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(mesh: Mesh, shapes: Any, *, layout: str = "learner") -> Any:
    """Shardings of a parameter tree, stacked or a tuple of layers (it shows in the paths).

    Args:
        shapes: tree whose leaves have `.shape` (arrays, or jax.ShapeDtypeStruct from jax.eval_shape).
        layout: "learner" splits over fsdp and tensor; "tensor" over tensor alone (the rollout's copy, laid
            out by model/columns.py, whole on each data and fsdp coordinate); "replicated" (of the same) not
            at all.

    Returns:
        a tree like `shapes` of NamedSharding.

    Raises:
        ValueError: a path without a rule, a leaf of another rank than its rule, or a dimension that its mesh
            axis does not divide; it names the path.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _param_spec(mesh, path_name(path), leaf.shape, layout)), shapes
    )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of a training state: parameters and what repeats their tree, such as the moments of Adam.

    A leaf belongs to a parameter when its path ends like one (`opt_state/1/mu/embed/embedding`). Scalars are
    replicated.

    Raises:
        ValueError: as param_shardings.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        return NamedSharding(mesh, P() if not leaf.shape else _param_spec(mesh, name, leaf.shape, "learner"))

    return jax.tree_util.tree_map_with_path(sharding, state)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over data × fsdp, the rest whole: rows of a batch."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def slots_sharding(mesh: Mesh, layout: str) -> NamedSharding:
    """Slots of a rollout: over data × fsdp, and over tensor as well where its parameters are replicated."""
    return NamedSharding(mesh, P(AXES if layout == "replicated" else ("data", "fsdp")))


def lookup_sharding(mesh: Mesh) -> NamedSharding:
    """The embedding while tokens are looked up in it: split over the vocabulary, whole rows."""
    return NamedSharding(mesh, P("tensor", None))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def _param_spec(mesh: Mesh, name: str, shape: tuple[int, ...], layout: str) -> P:
    if layout not in _TABLES:
        raise ValueError(f"layout is {layout!r}; it is 'learner', 'tensor' or 'replicated'")
    for pattern, letters, spec in _TABLES[layout]:
        found = pattern.search(name)
        if not found:
            continue
        if found.groupdict().get("index", "") is None:  # a layer leaf without a layer number is stacked
            letters, spec = "L" + letters, P(None, *spec)
        if len(shape) != len(letters):
            raise ValueError(f"{name} has shape {shape}; its sharding rule is for dimensions {letters}")
        if layout == "replicated":
            return P()
        if layout == "tensor":
            spec = P(*(axis if axis == "tensor" else None for axis in spec))
        _check_divides(mesh, name, shape, letters, spec)
        return spec
    raise ValueError(f"{name} of shape {shape} has no sharding rule; add one to RULES in runtime/mesh.py")


def _check_divides(mesh: Mesh, name: str, shape: tuple[int, ...], letters: str, spec: P) -> None:
    for size, letter, axis in zip(shape, letters, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} has {size} {_DIMENSIONS[letter]} ({letter}), which mesh.{axis} = {mesh.shape[axis]} "
                f"does not divide; choose mesh.{axis} that divides {size}"
            )


def shapes_on(shapes: Any, shardings: Any) -> Any:
    """Shapes (a tree of jax.ShapeDtypeStruct) with the shardings that their arrays will have."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
