"""The devices of a run: those that jax finds, what their kind has, and the most memory that one has held.

Owns the table of kinds. Must not know what is computed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ngrpo_jax.errors import UserError

# What JAX_PLATFORMS calls an accelerator -> jax.Device.platform, and the extra of pyproject.toml for it.
_ACCELERATORS = {"tpu": ("tpu", "tpu"), "cuda": ("gpu", "cuda12"), "gpu": ("gpu", "cuda12")}
_HELD = ("in use", "lockfile")  # what libtpu says where another process has the TPU


class Chip(NamedTuple):
    """What one jax.Device of a kind has.

    Attributes:
      flops: dense bfloat16 operations a second.
      memory_gib: GiB of memory that the runtime leaves to programs; None where we do not know it.
      bandwidth: bytes a second of that memory.
      links: bytes a second to and from the other devices of its slice or node, both directions together.
      clock: GHz by which the TPU compiler's estimated cycles become seconds; None where it tells none.
    """

    flops: float
    memory_gib: float | None = None
    bandwidth: float | None = None
    links: float | None = None
    clock: float | None = None


# Keys are the first words of device_kind; the longest key that fits counts. Rates are the makers':
# https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x and NVIDIA's data sheets of each GPU. Memory
# is less than on the data sheet: TPUs' is what the compiler calls the capacity of HBM, GPUs' what the driver
# reports. A jax.Device of TPU v2, v3 and 7x is one of the two cores of a chip.
CHIPS = {
    "TPU v2": Chip(22.5e12),
    "TPU v3": Chip(61.5e12),
    "TPU v4": Chip(275e12, 31.25, 1228e9, 300e9, 1.05),
    "TPU v4 lite": Chip(137e12),
    "TPU v5": Chip(459e12, 95.74, 2765e9, 600e9, 1.75),
    "TPU v5p": Chip(459e12, 95.74, 2765e9, 600e9, 1.75),
    "TPU v5 lite": Chip(197e12, 15.75, 819e9, 200e9, 1.5),
    "TPU v5e": Chip(197e12, 15.75, 819e9, 200e9, 1.5),
    "TPU v6 lite": Chip(918e12, 31.25, 1640e9, 448e9, 1.75),
    "TPU v6e": Chip(918e12, 31.25, 1640e9, 448e9, 1.75),
    "TPU7x": Chip(1153e12, 94.75, 3690e9, 600e9, 2.2),
    "NVIDIA A100": Chip(312e12, 79.1, 2039e9, 600e9),
    "NVIDIA H100 PCIe": Chip(756e12, 79.1, 2000e9, 600e9),
    "NVIDIA H100": Chip(989e12, 79.1, 3350e9, 900e9),
    "NVIDIA H100 NVL": Chip(835e12, 93.0, 3900e9, 600e9),
    "NVIDIA H200": Chip(989e12, 139.8, 4800e9, 900e9),
    "NVIDIA L4": Chip(121e12, 22.0, 300e9, 32e9),
    "NVIDIA L40": Chip(181e12, 44.4, 864e9, 32e9),
    "NVIDIA L40S": Chip(362e12, 44.4, 864e9, 32e9),
    "NVIDIA B200": Chip(2250e12, 178.4, 8000e9, 1800e9),
}


def visible() -> Sequence[jax.Device]:
    """All devices of the run, on the platform that JAX_PLATFORMS names first; without it, jax chooses.

    Raises:
      UserError: JAX_PLATFORMS names an accelerator first that is not here, or that another process holds.
    """
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    wanted = (platforms or "").partition(",")[0]
    reason = "it has no plugin for it, or sees no such device"
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, for "cuda"
        devices, reason = [], " ".join(str(error).partition(" (set ")[0].split()) or reason
        if wanted not in _ACCELERATORS:
            raise
    platform, extra = _ACCELERATORS.get(wanted, ("", ""))
    if wanted not in _ACCELERATORS or (devices and devices[0].platform == platform):
        return devices
    remedy = (
        "end the process that holds it (launch/tpu/stop.sh)"
        if is_held(reason)
        else f"pip install -e '.[{extra}]' on a machine that has one, or set JAX_PLATFORMS=cpu"
    )
    raise UserError(f"JAX_PLATFORMS asks for {wanted}, which jax cannot use here ({reason}); {remedy}.")


def is_held(reason: str) -> bool:
    """Whether libtpu's words say that another process has the TPU."""
    return any(word in reason for word in _HELD)


def chip(device: Any) -> Chip | None:
    """What a device of this kind has; None where the table does not have it (CPUs)."""
    # "NVIDIA A100-SXM4-80GB": a hyphen ends a word too.
    words = f"{device.device_kind.replace('-', ' ')} "
    fitting = [kind for kind in CHIPS if words.startswith(f"{kind} ")]
    return CHIPS[max(fitting, key=len)] if fitting else None


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 operations a second of a device; None where the table does not have it."""
    known = chip(device)
    return None if known is None else known.flops


def peak_memory(device: Any) -> int | None:
    """The most bytes that a device has held since the process began; for a CPU, that the process has.

    None where the platform does not report it.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="ascii", errors="replace").split("\n") if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
