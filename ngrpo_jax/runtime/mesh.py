"""The device mesh, and how each array is split over it.

Owns the three mesh axes and the table from a parameter's path to its sharding. Must not know what the
parameters mean, how a step is computed, or any settings: other rooms get a sharding as an argument.

Axes, outermost first:
    data    whole copies of the learner's state; rows of a batch are split over it
    fsdp    parameters, optimiser state and rows of a batch are split over it
    tensor  heads, feed-forward width and vocabulary are split over it

Letters of this file: Q query heads of a key/value head; J = Q + 2, those heads with their key and value.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ngrpo_jax.errors import explained, require
from ngrpo_jax.runtime import hardware

AXES = ("data", "fsdp", "tensor")
# Dimension letter -> what it counts, and the axis that splits it. L is never split, because a scan over
# layers slices it at every layer.
DIMENSIONS: dict[str, tuple[str, str | None]] = {
    "V": ("vocabulary rows", "tensor"),
    "D": ("model width", "fsdp"),
    "N": ("query heads", "tensor"),
    "K": ("key/value heads", "tensor"),
    "F": ("feed-forward width", "tensor"),
    "H": ("head size", None),
    "J": ("query heads, key and value of a key/value head", None),
    "Q": ("query heads of a key/value head", None),
    "R": ("adapter rank", None),
    "2": ("matrices", None),
    "L": ("layers", None),
}
# The scales of norms are a few kilobytes: gathering them would cost more than a whole copy everywhere.
WHOLE = ("D", "H")
# Path of a parameter -> its dimension letters, of a layer's without the leading [L]. `layers/...` are stacked
# leaves [L, ...], `layers/7/...` those of layer 7 alone.
_LAYER = r"layers(?P<index>/\d+)?"
LEARNER = {
    r"(embed/embedding|head/rows)": "VD",
    rf"(final_norm|{_LAYER}/(input_norm|post_attention_norm))/scale": "D",
    rf"{_LAYER}/attention/q/kernel": "DNH",
    rf"{_LAYER}/attention/[kv]/kernel": "DKH",
    rf"{_LAYER}/attention/q/bias": "NH",
    rf"{_LAYER}/attention/[kv]/bias": "KH",
    rf"{_LAYER}/attention/[qk]_norm/scale": "H",
    rf"{_LAYER}/attention/o/kernel": "NHD",
    rf"{_LAYER}/mlp/(gate|up)/kernel": "DF",
    rf"{_LAYER}/mlp/down/kernel": "FD",
    # Adapters (model/lora.py) are split as the sides of their matrix are.
    rf"{_LAYER}/(attention/[qkv]|mlp/(gate|up))/lora_a": "DR",
    rf"{_LAYER}/attention/q/lora_b": "RNH",
    rf"{_LAYER}/attention/[kv]/lora_b": "RKH",
    rf"{_LAYER}/attention/o/lora_a": "NHR",
    rf"{_LAYER}/mlp/(gate|up)/lora_b": "RF",
    rf"{_LAYER}/mlp/down/lora_a": "FR",
    rf"{_LAYER}/(attention/o|mlp/down)/lora_b": "RD",
}
# In the rollout's layout (model/inference.py) matrices are joined, and their outputs come first.
ROLLOUT = {
    **LEARNER,
    rf"{_LAYER}/attention/qkv/kernel": "KJHD",
    rf"{_LAYER}/attention/qkv/bias": "KJH",
    rf"{_LAYER}/attention/o/kernel": "DKQH",
    rf"{_LAYER}/mlp/gate_up/kernel": "2FD",
    rf"{_LAYER}/mlp/down/kernel": "DF",
    rf"{_LAYER}/attention/qkv/kernel_scale": "KJH",
    rf"{_LAYER}/(attention/o|mlp/down)/kernel_scale": "D",
    rf"{_LAYER}/mlp/gate_up/kernel_scale": "2F",
}
# Layout -> its table, and the axes that split parameters in it.
LAYOUTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "learner": (LEARNER, ("fsdp", "tensor")),
    "tensor": (ROLLOUT, ("tensor",)),
    "replicated": (ROLLOUT, ()),
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices`, by default of all devices of all hosts.

    All axes are Auto: shardings are given at the edges of a jitted program, and XLA finds the rest. Devices
    along the tensor axis belong to one host, because each host's rollout runs on its own devices alone.

    Raises:
        UserError: a size below 1, sizes whose product is not the number of devices, or a tensor axis that
            does not divide the devices of a host.
    """
    devices = list(hardware.visible() if devices is None else devices)
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    for name, size in sizes.items():
        require(size >= 1, f"{name} is {size}; a mesh axis has at least one device")
    product = " × ".join(f"{name} {size}" for name, size in sizes.items())
    require(
        math.prod(sizes.values()) == len(devices),
        f"{product} = {math.prod(sizes.values())}, but there are {len(devices)} devices; "
        f"choose mesh.data, mesh.fsdp and mesh.tensor whose product is {len(devices)}",
    )
    auto = (AxisType.Auto,) * len(AXES)
    with explained(NotImplementedError, f"this slice cannot have {product}", "choose other sizes"):
        grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, AXES, axis_types=auto)
    counts = collections.Counter(device.process_index for device in devices)
    listed = ", ".join(f"process {index} has {count}" for index, count in sorted(counts.items()))
    require(
        len(counts) == 1 or (len(set(counts.values())) == 1 and counts[min(counts)] % tensor == 0),
        f"mesh.tensor {tensor} does not divide the devices of every host alike ({listed}); the rollout of a "
        "host runs on its own devices, so choose mesh.tensor that divides them",
    )
    if all(len({device.process_index for device in row}) == 1 for row in mesh.devices.reshape(-1, tensor)):
        return mesh
    # jax orders devices for the fastest connections, and a tensor group may then span hosts. By host instead:
    ordered = np.array(sorted(devices, key=lambda device: (device.process_index, device.id)))
    return Mesh(ordered.reshape(data, fsdp, tensor), AXES, axis_types=auto)


def local_mesh(mesh: Mesh) -> Mesh:
    """The mesh of this process's devices, data × 1 × tensor; `mesh` itself where it has no others."""
    own = jax.process_index()
    if all(device.process_index == own for device in mesh.devices.flat):
        return mesh
    tensor = mesh.shape["tensor"]
    rows = [row for row in mesh.devices.reshape(-1, tensor) if row[0].process_index == own]
    return Mesh(np.array(rows).reshape(len(rows), 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def hosts(mesh: Mesh) -> int:
    """How many processes have devices of the mesh."""
    return len({device.process_index for device in mesh.devices.flat})


def device_of(mesh: Mesh) -> jax.Device:
    """A device of this process; the others of the mesh are of the same kind."""
    return local_mesh(mesh).devices.flat[0]


def put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A NumPy array that every process has, as an array on the devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def reshard(tree: Any, shardings: Any) -> Any:
    """Arrays with other shardings on the same devices. A collective: every process calls it."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_put(tree, shardings)
    return jax.tree.map(lambda leaf, to: jax.jit(_identity, out_shardings=to)(leaf), tree, shardings)


def on_this_host(tree: Any, shardings: Any) -> Any:
    """A copy on this process's devices alone. The shardings must not split over data or fsdp.

    A collective: every process calls it. With one process this is `reshard`.
    """
    resharded = reshard(tree, shardings)
    leaves = jax.tree.leaves(shardings)
    local = local_mesh(leaves[0].mesh)
    if local is leaves[0].mesh:
        return resharded

    def own_part(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        own = NamedSharding(local, sharding.spec)
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        devices = own.addressable_devices_indices_map(leaf.shape)
        return jax.make_array_from_single_device_arrays(leaf.shape, own, [parts[d] for d in devices])

    return jax.tree.map(own_part, resharded, shardings)


def to_host(leaf: Any) -> np.ndarray:
    """A whole array as NumPy, on every process. A collective: every process calls it."""
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = reshard(leaf, replicated(leaf.sharding.mesh))
    return np.asarray(leaf)


def _identity(leaf: jax.Array) -> jax.Array:
    return leaf


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as `layers/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(mesh: Mesh, shapes: Any, *, layout: str = "learner") -> Any:
    """Shardings of a parameter tree whose layers are stacked or a tuple (the paths show which).

    Args:
        shapes: tree whose leaves have `.shape` (arrays, or jax.ShapeDtypeStruct from jax.eval_shape).
        layout: "learner" splits over fsdp and tensor. The others are those of the rollout's copy
            (model/inference.py): "tensor" splits over tensor alone, "replicated" not at all.

    Returns:
        a tree like `shapes` of NamedSharding.

    Raises:
        ValueError: a path without a rule, or a leaf of another rank than its rule; it names the path.
        UserError: a dimension that its mesh axis does not divide; it names the path and the axis.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _param_spec(mesh, path_name(path), leaf.shape, layout)), shapes
    )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of a training state: of the parameters and of trees like theirs, such as Adam's moments.

    A leaf has the rule of the parameter whose path its own path ends with (`opt_state/1/mu/embed/embedding`).
    Scalars are replicated.

    Raises:
        ValueError, UserError: as param_shardings.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        return NamedSharding(mesh, P() if not leaf.shape else _param_spec(mesh, name, leaf.shape, "learner"))

    return jax.tree_util.tree_map_with_path(sharding, state)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch: the leading dimension over data × fsdp, the other dimensions whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def slots_sharding(mesh: Mesh, layout: str) -> NamedSharding:
    """Slots of a rollout: over data × fsdp, and where its parameters are replicated over tensor as well."""
    return NamedSharding(mesh, P(AXES if layout == "replicated" else ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def _param_spec(mesh: Mesh, name: str, shape: tuple[int, ...], layout: str) -> P:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it is one of {', '.join(LAYOUTS)}")
    table, axes = LAYOUTS[layout]
    letters = _letters(name, table)
    if letters is None:
        raise ValueError(f"{name} of shape {shape} has no sharding rule; add one to runtime/mesh.py")
    if len(shape) != len(letters):
        raise ValueError(f"{name} has shape {shape}; its sharding rule is for dimensions {letters}")
    if not axes:
        return P()
    whole = letters.removeprefix("L") in WHOLE
    spec = []
    for size, letter in zip(shape, letters, strict=True):
        noun, axis = DIMENSIONS[letter]
        axis = axis if axis in axes and not whole else None
        # Fine-tuned models have vocabularies of any size: one that the axis does not divide is not split.
        axis = None if letter == "V" and size % mesh.shape["tensor"] else axis
        require(
            axis is None or size % mesh.shape[axis] == 0,
            f"{name} has {size} {noun} ({letter}), which mesh.{axis} = {mesh.shape.get(axis)} does not "
            f"divide; choose mesh.{axis} that divides {size}",
        )
        spec.append(axis)
    return P(*spec)


def _letters(name: str, table: dict[str, str]) -> str | None:
    """The dimension letters of the parameter whose path `name` ends with; None without a rule."""
    for pattern, letters in table.items():
        found = re.search(rf"(?:^|/){pattern}$", name)
        if found:
            stacked = "layers" in found[0] and not found["index"]
            return "L" * stacked + letters
    return None


def shapes_on(shapes: Any, shardings: Any) -> Any:
    """A tree of jax.ShapeDtypeStruct with the shardings that their arrays will have."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
