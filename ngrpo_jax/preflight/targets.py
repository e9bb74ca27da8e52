"""Devices of a TPU slice or of a node of GPUs that need not be here: for compiling alone.

Owns how such devices are described to the compilers. No array can be made on them, and nothing runs.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.runtime import hardware

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# Chips of the one host that such a slice has; left to itself libtpu describes two hosts of four chips.
_ONE_HOST = {
    f"{chip}:{shape}": size
    for chip in ("v5e", "v6e")
    for shape, size in {"2x2": (2, 2, 1), "2x4": (2, 4, 1)}.items()
}
_HOSTS = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4"}  # chips of a host -> how they lie
_HOPPER = """
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
"""
# Name of a GPU -> device_kind, and what XLA's cost model is told of it (device_description.proto).
GPUS = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        f"{_HOPPER} memory_bandwidth: 3352320000000 device_memory_size: 84929347584",
    ),
    "h200": (
        "NVIDIA H200",
        f"{_HOPPER} memory_bandwidth: 4814000000000 device_memory_size: 150110011392",
    ),
}
# libtpu reads these when it is loaded; without them it asks a metadata server which machine this is.
_OF_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_EXAMPLES = "v5e:2x4, v6e:2x4, v5p:2x2x1, v4:2x2x1, v5e:4x4 (four hosts), h100:1, h100:8, h200:8"


def devices(target: str) -> Sequence[jax.Device]:
    """The devices of "CHIP:TOPOLOGY" (a TPU slice) or "GPU:COUNT"; to be called before jax has a backend.

    Raises:
      UserError: an unknown target, or one whose compiler is not installed.
    """
    chip, _, shape = target.partition(":")
    known = f"--target={target} is unknown; use one of {_EXAMPLES}"
    require(chip in (*TPUS, *GPUS), known)
    jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is needed, nor waited for
    if chip in GPUS:
        require(shape.isdigit() and 0 < int(shape) <= 8, known)
        _require_installed(target, "GPUs", "aot-cuda12", ("jax_cuda12_plugin", "nvidia.cudnn"))
        return _gpus(chip, int(shape))
    require(all(part.isdigit() for part in shape.split("x")), known)
    _require_installed(target, "TPUs", "aot-tpu", ("libtpu",))
    return _tpus(target, known)


def host_devices(target: str, whole: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """The devices of one host of a slice as a slice of their own; `whole` itself where it is one host.

    Rollouts run on each host's devices alone. What a host of several compiles for its own devices runs, but
    libtpu refuses to compile it for some devices of a described slice.
    """
    own = [device for device in whole if device.process_index == whole[0].process_index]
    if len(own) == len(whole):
        return whole
    chip, _, shape = target.partition(":")
    return _tpus(f"{chip}:{_HOSTS[len(own)]}" + "x1" * (shape.count("x") - 1), target)


def _require_installed(target: str, what: str, extra: str, modules: Sequence[str]) -> None:
    missing = [name for name in modules if not _found(name)]
    require(
        not missing,
        f"--target={target} needs the compiler for {what} ({', '.join(missing)} is not installed): "
        f"pip install -e '.[{extra}]'",
    )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _tpus(target: str, known: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies  # here alone: it loads a compiler

    for name, value in _OF_LIBTPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chips_per_host_bounds": _ONE_HOST[target]} if target in _ONE_HOST else {}
    if target.startswith("v4:"):
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:160]
        held = f"--target={target} needs libtpu, which another process holds ({said}); end that process"
        raise UserError(held if hardware.is_held(said) else f"{known} (libtpu: {said})") from error


def _gpus(chip: str, count: int) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    kind, facts = GPUS[chip]
    config = (
        f'gpu_device_info {{ {facts} }} platform_name: "CUDA" device_description_str: "{kind}" '
        "runtime_version { major: 12 minor: 9 patch: 0 } dnn_version_info { major: 9 minor: 8 }"
    )
    return topologies.get_topology_desc(chip, "cuda", target_config=config, topology=f"1x1x{count}").devices
