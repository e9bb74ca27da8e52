"""Several processes as one run: how they find each other and exchange small values.

Owns `jax.distributed`. Must not know what is exchanged; how processes end is in ending.py. In a run of one
process `initialize` joins nothing, and `allgather` returns its argument.

Every process calls `allgather` the same number of times in the same order. Each call carries a name, so that
processes that are not at the same call raise an error instead of mixing up values.
"""

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

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.runtime import ending, hardware

Json = Any

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_LEAST_ROOM = 4096  # bytes exchanged for a value, so that nearly all exchanges are one compiled program
_VISIBLE_S = 20.0  # how long a file of another host may take to appear on shared storage


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the processes of a run, by its number."""

    index: int
    count: int

    @property
    def primary(self) -> bool:
        """Whether this process writes the files of which a run has one, and prints."""
        return self.index == 0

    @property
    def several(self) -> bool:
        """Whether the run has other processes."""
        return self.count > 1

    def share(self, total: int) -> range:
        """The indices of this process's part of `total` items: every count-th, from its own number on."""
        return range(self.index, total, self.count)


def process() -> Process:
    """This process among those of its run."""
    return Process(jax.process_index(), jax.process_count())


def initialize() -> Process:
    """Joins the run's other processes; to be called before anything asks jax for a device.

    They are found by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by the variables that
    srun sets, or on a TPU by jax itself. Without any of these the run is this process alone.

    Where one process ends without the others, jax's coordination service, which process 0 runs, ends those
    within `ending.HEARTBEAT_S`.

    Raises:
        UserError: variables that are missing or contradict each other, each named; no accelerator where
            JAX_PLATFORMS asks for one.
        ConnectionError: the other processes cannot be reached.
    """
    if jax.distributed.is_initialized():
        return process()
    given = explicit(os.environ)
    if given is not None and given[1].several:
        coordinator, this = given
        _join(
            f"process {this.index} of {this.count}, whose coordinator is {coordinator}",
            coordinator_address=coordinator,
            num_processes=this.count,
            process_id=this.index,
            cluster_detection_method=None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else "deactivate",
        )
    elif given is None and (tasks := slurm_tasks(os.environ)):
        _join(f"task {os.environ['SLURM_PROCID']} of the {tasks} of SLURM job {os.environ['SLURM_JOB_ID']}")
    elif given is None and _on_tpu(os.environ):
        try:
            _join("this worker of the TPU")
        except ConnectionError:
            hardware.visible()  # where there is no TPU, that is the reason
            raise
    hardware.visible()
    this, started = process(), _started(os.environ)
    if not jax.distributed.is_initialized():
        return this
    ending.joined(several=this.several, primary=this.primary)
    require(
        started in (0, this.count),
        f"{started} processes were started, but the {jax.default_backend()} devices are those of "
        f"{this.count}; is JAX_PLATFORMS the same for all, and are their devices visible?",
    )
    return this


def explicit(environment: Mapping[str, str]) -> tuple[str, Process] | None:
    """(address of the coordinator, this process) by the three JAX_ variables; None where none of them is set.

    Raises:
        UserError: some of them are missing, or one has no possible value.
    """
    missing = [name for name in EXPLICIT if not environment.get(name)]
    if len(missing) == len(EXPLICIT):
        return None
    found = [name for name in EXPLICIT if name not in missing]
    require(
        not missing,
        f"{' and '.join(found)} is set, but not {' and '.join(missing)}; several processes need all "
        "three variables, and a single one none.",
    )
    address, *numbers = (environment[name] for name in EXPLICIT)
    for name, text in zip(EXPLICIT[1:], numbers, strict=True):
        require(text.isdecimal(), f"{name} is {text!r}; it must be a whole number.")
    count, index = map(int, numbers)
    require(
        index < count,
        f"JAX_PROCESS_ID is {index} with JAX_NUM_PROCESSES {count}; it must be between 0 and {count - 1}.",
    )
    host, _, port = address.rpartition(":")
    require(
        bool(host) and port.isdecimal(),
        f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of process 0.",
    )
    return address, Process(index, count)


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the job step that srun started this process in; 0 outside of a step, and where it is alone."""
    if not all(environment.get(name) for name in SLURM):
        return 0
    tasks = int(environment["SLURM_NTASKS"])
    return tasks if tasks > 1 else 0


def require_alone(command: str) -> None:
    """UserError where a launcher started several processes of a command that is for one."""
    started = _started(os.environ)
    require(started <= 1, f"{command} was started as {started} processes; it is for one: start it once.")


def _started(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started; 0 where no variable tells."""
    given = explicit(environment)
    return slurm_tasks(environment) if given is None else given[1].count


def _on_tpu(environment: Mapping[str, str]) -> bool:
    """Whether jax will use TPUs, by what can be known before it starts."""
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
    # Before the backend starts, which may fail on one process alone.
    ending.joined(several=True, primary=False)


def allgather(name: str, value: Json) -> list[Json]:
    """The values of all processes, by process number. Every process has to call this.

    Args:
        name: says which call this is; the same on every process.
        value: JSON-able; numbers are exact.

    Raises:
        RuntimeError: another process is at a call with another name.
    """
    this = process()
    if not this.several:
        return [value]
    own = np.frombuffer(json.dumps({"name": name, "value": value}).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    room = max(_LEAST_ROOM, 1 << int(sizes.max() - 1).bit_length())
    frames = multihost_utils.process_allgather(np.pad(own, (0, room - own.size)))
    messages = [json.loads(frame[:size].tobytes()) for frame, size in zip(frames, sizes, strict=True)]
    for index, message in enumerate(messages):
        if message["name"] != name:
            raise RuntimeError(
                f"process {this.index} exchanges {name!r} and process {index} {message['name']!r}; every "
                "process must make the same exchanges in the same order"
            )
    return [message["value"] for message in messages]


def allgather_items(name: str, values: list[Json]) -> list[Json]:
    """The values of all items, in their order, from those of the items in each process's `Process.share`."""
    parts = allgather(name, values)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def check_shared(workdir: str | os.PathLike[str]) -> None:
    """Checks that all processes can write the workdir and read there what the others wrote; leaves no file.

    Raises:
        UserError: on every process, naming one that cannot.
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
    unread = allgather("reading the workdir", missing)
    own.unlink(missing_ok=True)
    allgather("leaving the workdir", None)
    if this.primary and directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    for index, problem in enumerate(unwritten):
        require(not problem, f"--workdir {directory} cannot be written by process {index} ({problem}).")
    for index, names in enumerate(unread):
        if names:
            other = names[0].rpartition("-")[2]
            raise UserError(
                f"--workdir {directory} is not shared: process {index} does not find the file that process "
                f"{other} wrote there; name a directory on storage that all hosts share."
            )


def _missing(directory: pathlib.Path, names: list[str]) -> list[str]:
    """The names of which there is no file, after a wait for storage that shows files late."""
    deadline = time.monotonic() + _VISIBLE_S
    while True:
        missing = [name for name in names if not (directory / name).exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)
