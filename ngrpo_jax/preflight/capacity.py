"""What this machine has: memory of a device, and a disk that the workdir can be written to.

Owns what is read from the system; changes nothing. Must not know what a run needs (memory.py).
"""

import os
import pathlib
import shutil
import tempfile

import jax

from ngrpo_jax.errors import UserError, require, storage
from ngrpo_jax.runtime import mesh
from ngrpo_jax.runtime.console import format_bytes


def available_memory(devices: jax.sharding.Mesh) -> int | None:
    """Bytes that one device of this host may use; None where the system gives no number."""
    return device_memory(mesh.device_of(devices), sharers=mesh.local_mesh(devices).size)


def device_memory(device: jax.Device, sharers: int = 1) -> int | None:
    """Bytes that a device may use; None where the system gives no number.

    Args:
        sharers: CPU devices among which the host's memory is divided.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return int(stats["bytes_limit"]) if "bytes_limit" in stats else None
    free = [size for size in (host_memory(), container_memory()) if size is not None]
    return min(free) // sharers if free else None


def whole_memory(devices: jax.sharding.Mesh) -> int | None:
    """Bytes of a device's own memory left to programs, used or not; None: none, or unknown."""
    device = mesh.device_of(devices)
    return None if device.platform == "cpu" else device_memory(device)


def check_workdir(workdir: str | os.PathLike[str], needed_bytes: int = 0) -> None:
    """Checks that the workdir can be written, or made, and has room; writes nothing.

    Raises:
        UserError: it is a file, may not be written, or lies on a disk with less free than `needed_bytes`.
    """
    path = pathlib.Path(workdir)
    require(path.is_dir() or not path.exists(), f"--workdir {path} is a file; name a directory.")
    existing = nearest_existing(path)
    require(
        existing.is_dir(),
        f"--workdir {path} cannot be made, because {existing} is a file; name another directory.",
    )
    verb = "written" if path.exists() else f"made, because {existing} may not be written"
    require(is_writable(existing), f"--workdir {path} cannot be {verb}; name another directory.")
    free = shutil.disk_usage(existing).free
    require(
        free >= needed_bytes,
        f"--workdir {path} lies on a disk with {format_bytes(free)} free, and the checkpoints of this model "
        f"need {format_bytes(needed_bytes)}; name a directory on another disk.",
    )


def check_renames(workdir: pathlib.Path) -> None:
    """Checks that folders of an existing workdir can be renamed: a checkpoint that is whole gets its name so.

    Raises:
        UserError: they cannot, as in a bucket without folders of its own.
    """
    with storage(workdir, "written"), tempfile.TemporaryDirectory(prefix=".rename-", dir=workdir) as probe:
        folder = pathlib.Path(probe, "one")
        folder.mkdir()
        (folder / "file").touch()
        try:
            folder.rename(folder.with_name("other"))
        except OSError as error:
            raise UserError(
                f"folders in {workdir} cannot be renamed ({error.strerror}), as a checkpoint is when it is "
                "whole; a mounted bucket has to be made with a hierarchical namespace (docs/launch.md)."
            ) from error


def nearest_existing(path: pathlib.Path) -> pathlib.Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def is_writable(folder: pathlib.Path) -> bool:
    """Whether files can be made in a folder."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def host_memory(path: str = "/proc/meminfo") -> int | None:
    """Bytes that Linux counts as available; None on other systems."""
    if not os.path.exists(path):
        return None
    for line in pathlib.Path(path).read_text(encoding="ascii").split("\n"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def container_memory(directory: str = "/sys/fs/cgroup") -> int | None:
    """Bytes that a container's limit leaves (cgroup v2), its file cache counted as free; None without one."""
    limit, used, stat = (pathlib.Path(directory, f"memory.{name}") for name in ("max", "current", "stat"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    lines = stat.read_text().split("\n") if stat.exists() else []
    cache = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return int(limit.read_text()) - int(used.read_text()) + cache
