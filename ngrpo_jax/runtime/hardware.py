"""Properties of a device: its peak arithmetic, and the most memory that it has held.

Owns the table of peaks. Must not know what is computed.
"""

from pathlib import Path
from typing import Any

# Dense bfloat16 operations a second of one jax.Device, as its maker states them. Keys are the first words of
# device_kind; the longest key that fits counts. A jax.Device of TPU v2 and v3 is one of the two cores of a
# chip.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 137e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 operations a second of a device; None where the table does not have it (CPUs)."""
    # "NVIDIA A100-SXM4-80GB": a hyphen ends a word too.
    words = f"{device.device_kind.replace('-', ' ')} "
    fitting = [kind for kind in PEAK_FLOPS if words.startswith(f"{kind} ")]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


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
