"""Several processes as one run: how they find each other and exchange small values.

Owns `jax.distributed`. Must not know what is exchanged; how processes end is in ending.py. In a run of one
process `initialize` joins nothing, and `allgather` returns its argument.

Every process calls `allgather` the same number of times in the same order. Each call carries a name, so that
processes that are not at the same call raise an error instead of mixing up values.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ngrpo_jax.errors import UserError

from . import ending

Json = Any

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_FRAME = 4096  # bytes of the first message; longer values need a second one
_VISIBLE_S = 20.0  # how long a file of another host may take to appear on shared storage


@dataclasses.dataclass(frozen=True)
class Process:
    """Which process of its run this is."""

    index: int
    count: int

    @property
    def primary(self) -> bool:
        """Whether this is the process that writes what a run has once."""
        return self.index == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def share(self, total: int) -> range:
        """Which of `total` things, in the order of a run of one process, are this one's: every count-th."""
        return range(self.index, total, self.count)


@dataclasses.dataclass(frozen=True)
class Explicit:
    """The place that a launcher gave by the three JAX_ variables."""

    coordinator: str
    count: int
    index: int


def process() -> Process:
    """This process among those of its run."""
    return Process(jax.process_index(), jax.process_count())


def initialize() -> Process:
    """Joins the run's other processes, before anything asks jax for a device.

    They are found by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by the variables that
    srun sets, or on a TPU by jax itself. Without any of them the run is this process alone.

    Where one process ends without the others, jax's coordination service, which process 0 runs, ends those
    within `ending.HEARTBEAT_S`.

    Raises:
        UserError: variables that are missing or contradict each other, each named.
        ConnectionError: the other processes cannot be reached.
    """
    if jax.distributed.is_initialized():
        return process()
    given = explicit(os.environ)
    if given is not None:
        if given.count == 1:
            return process()
        _join(
            f"process {given.index} of {given.count}, whose coordinator is {given.coordinator}",
            coordinator_address=given.coordinator,
            num_processes=given.count,
            process_id=given.index,
            cluster_detection_method=None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else "deactivate",
        )
    elif tasks := slurm_tasks(os.environ):
        _join(f"task {os.environ['SLURM_PROCID']} of the {tasks} of SLURM job {os.environ['SLURM_JOB_ID']}")
    elif _on_tpu(os.environ):
        _join("this worker of the TPU")
    else:
        return process()
    this = process()
    ending.joined(several=this.several, primary=this.primary)
    expected = given.count if given is not None else slurm_tasks(os.environ) or this.count
    if this.count != expected:
        raise UserError(
            f"{expected} processes were started, but the {jax.default_backend()} devices are those of "
            f"{this.count}; is JAX_PLATFORMS the same for all, and are their devices visible?"
        )
    return this


def explicit(environment: Mapping[str, str]) -> Explicit | None:
    """What the three JAX_ variables say, None where none is set; ValueError where they are wrong."""
    missing = [name for name in EXPLICIT if not environment.get(name)]
    if len(missing) == len(EXPLICIT):
        return None
    if missing:
        there = [name for name in EXPLICIT if name not in missing]
        raise UserError(
            f"{' and '.join(there)} is set, but not {' and '.join(missing)}; several processes need all "
            "three, and one alone none."
        )
    address, *numbers = (environment[name] for name in EXPLICIT)
    values = []
    for name, text in zip(EXPLICIT[1:], numbers, strict=True):
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}; it must be a whole number.")
        values.append(int(text))
    count, index = values
    if not index < count:
        raise UserError(
            f"JAX_PROCESS_ID is {index} with JAX_NUM_PROCESSES {count}; they count from 0 to {count - 1}."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of process 0.")
    return Explicit(address, count, index)


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step that srun started this process in; 0 outside of one, and in one of a single task."""
    if not all(environment.get(name) for name in SLURM):
        return 0
    tasks = int(environment["SLURM_NTASKS"])
    return tasks if tasks > 1 else 0


def require_alone(command: str) -> None:
    """ValueError where this process was started as one of several, which this command does not know."""
    given = explicit(os.environ)
    several = max(slurm_tasks(os.environ), given.count if given is not None else 1)
    if several > 1:
        raise UserError(f"{command} was started as {several} processes; it is for one: start it once.")


def _on_tpu(environment: Mapping[str, str]) -> bool:
    """Whether jax is going to use TPUs, as far as can be told before it does."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return "tpu" in platforms.split(",")
    return importlib.util.find_spec("libtpu") is not None and any(
        path.exists() for path in (pathlib.Path("/dev/accel0"), pathlib.Path("/dev/vfio/0"))
    )


def _join(who: str, **arguments: Any) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read by the CPU backend alone
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=ending.HEARTBEAT_S, **arguments)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConnectionError(
            f"{who}, cannot join the run ({reason}); were all of them started, and do they reach process 0?"
        ) from error
    ending.joined(
        several=True, primary=False
    )  # before the backend starts, which may fail on one process alone


def allgather(name: str, value: Json) -> list[Json]:
    """What every process gave, by process index. Values are JSON; numbers come through exactly.

    Args:
        name: of the exchange; the same on every process, or they have lost step.
    """
    this = process()
    if not this.several:
        return [value]
    own = json.dumps({"name": name, "value": value}).encode()
    frames = _all_gather(own, _FRAME)
    longest = max(map(_length, frames))
    if longest > _FRAME - 4:
        frames = _all_gather(own, 1 << (longest + 3).bit_length())
    messages = [json.loads(frame[4 : 4 + _length(frame)].tobytes()) for frame in frames]
    for index, message in enumerate(messages):
        if message["name"] != name:
            raise RuntimeError(
                f"process {this.index} is at {name!r} and process {index} at {message['name']!r}: "
                "they have lost step with each other"
            )
    return [message["value"] for message in messages]


def allgather_items(name: str, values: list[Json]) -> list[Json]:
    """One value for each thing of this process's share -> those of all things, in their order."""
    parts = allgather(name, values)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def _all_gather(message: bytes, size: int) -> np.ndarray:
    """Every process's message, its length in front, cut off or filled up to `size` bytes: uint8 [n, size]."""
    frame = np.zeros(size, np.uint8)
    frame[:4] = np.frombuffer(len(message).to_bytes(4, "little"), np.uint8)
    body = np.frombuffer(message[: size - 4], np.uint8)
    frame[4 : 4 + len(body)] = body
    return np.asarray(multihost_utils.process_allgather(frame))


def _length(frame: np.ndarray) -> int:
    return int.from_bytes(frame[:4].tobytes(), "little")


def check_shared(workdir: str | os.PathLike[str]) -> None:
    """Asks, with several processes, whether all can write the workdir and see there what the others wrote.

    Raises:
        ValueError: on every process, naming those that cannot; nothing is left behind.
    """
    this = process()
    if not this.several:
        return
    directory = pathlib.Path(workdir)
    token = allgather("token of the workdir", secrets.token_hex(8))[0]
    names = [f".host-{token}-{index}" for index in range(this.count)]
    own = directory / names[this.index]
    problem = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        problem = str(error)
    unwritten = allgather("writing the workdir", problem)
    missing = [] if any(unwritten) else _missing(directory, names)
    unseen = allgather("reading the workdir", missing)
    own.unlink(missing_ok=True)
    allgather("leaving the workdir", None)
    if this.primary and directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    for index, problem in enumerate(unwritten):
        if problem:
            raise UserError(f"--workdir {directory} cannot be written by process {index} ({problem}).")
    for index, files in enumerate(unseen):
        if files:
            other = files[0].rpartition("-")[2]
            raise UserError(
                f"--workdir {directory} is not shared: process {index} does not see there what process "
                f"{other} wrote; name a directory on storage that all hosts share."
            )


def _missing(directory: pathlib.Path, names: list[str]) -> list[str]:
    """Which files are not there; waits for storage on which they appear late."""
    deadline = time.monotonic() + _VISIBLE_S
    while True:
        missing = [name for name in names if not (directory / name).exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)
