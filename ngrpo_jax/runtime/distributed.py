"""Several processes as one run: how they find each other, agree, and end together.

Owns `jax.distributed`, the exchange of small values between hosts, and the watcher beside each process
(watcher.py). Must not know what is exchanged. With one process nothing of this happens: `initialize` finds no
other process, `exchange` gives back what it got.

Every process calls `exchange` the same number of times in the same order; each exchange carries a name, so
that processes which lost step with each other say so instead of mixing up values.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from . import watcher

Json = Any

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_FRAME = 4096  # bytes of the first message; longer values need a second one
_HEARTBEAT_S = 300  # jax's own limit, by the clock: the watchers are faster, and bear a machine's suspension
_SEEN_S = 20.0  # how long a file of another host may take to appear on shared storage


@dataclasses.dataclass(frozen=True)
class Place:
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


_watcher: subprocess.Popen[str] | None = None


def place() -> Place:
    """This process among those of its run."""
    return Place(jax.process_index(), jax.process_count())


def initialize() -> Place:
    """Joins the run's other processes, before anything asks jax for a device.

    They are found by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by the variables that
    srun sets, or on a TPU by jax itself. Without any of them the run is this process alone.

    Raises:
        ValueError: variables that are missing or contradict each other, each named.
        OSError: the other processes cannot be reached.
    """
    if _watcher is not None:
        return place()
    given = explicit(os.environ)
    if given is not None:
        if given.count == 1:
            return place()
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
        return place()
    here = place()
    expected = given.count if given is not None else slurm_tasks(os.environ) or here.count
    if here.count != expected:
        raise ValueError(
            f"{expected} processes were started, but the {jax.default_backend()} devices are those of "
            f"{here.count}; is JAX_PLATFORMS the same for all, and are their devices visible?"
        )
    if here.several:
        _start_watcher(here, given.coordinator if given is not None else None)
    return here


def explicit(environment: Mapping[str, str]) -> Explicit | None:
    """What the three JAX_ variables say, None where none is set; ValueError where they are wrong."""
    missing = [name for name in EXPLICIT if not environment.get(name)]
    if len(missing) == len(EXPLICIT):
        return None
    if missing:
        there = [name for name in EXPLICIT if name not in missing]
        raise ValueError(
            f"{' and '.join(there)} is set, but not {' and '.join(missing)}; several processes need all "
            "three, and one alone none."
        )
    address, *numbers = (environment[name] for name in EXPLICIT)
    values = []
    for name, text in zip(EXPLICIT[1:], numbers, strict=True):
        if not text.isdecimal():
            raise ValueError(f"{name} is {text!r}; it must be a whole number.")
        values.append(int(text))
    count, index = values
    if not index < count:
        raise ValueError(
            f"JAX_PROCESS_ID is {index} with JAX_NUM_PROCESSES {count}; they count from 0 to {count - 1}."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of process 0.")
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
        raise ValueError(f"{command} was started as {several} processes; it is for one: start it once.")


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
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_S, **arguments)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"{who}, cannot join the run ({reason}); were all of them started, and do they reach process 0?"
        ) from error


def exchange(name: str, value: Json) -> list[Json]:
    """What every process gave, by process index. Values are JSON; numbers come through exactly.

    Args:
        name: of the exchange; the same on every process, or they have lost step.
    """
    here = place()
    if not here.several:
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
                f"process {here.index} is at {name!r} and process {index} at {message['name']!r}: "
                "they have lost step with each other"
            )
    return [message["value"] for message in messages]


def merge(name: str, values: list[Json]) -> list[Json]:
    """One value for each thing of this process's share -> those of all things, in their order."""
    parts = exchange(name, values)
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
    here = place()
    if not here.several:
        return
    directory = pathlib.Path(workdir)
    token = exchange("token of the workdir", secrets.token_hex(8))[0]
    names = [f".host-{token}-{index}" for index in range(here.count)]
    own = directory / names[here.index]
    problem = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        problem = str(error)
    unwritten = exchange("writing the workdir", problem)
    missing = [] if any(unwritten) else _missing(directory, names)
    unseen = exchange("reading the workdir", missing)
    own.unlink(missing_ok=True)
    exchange("leaving the workdir", None)
    if here.primary and directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    for index, problem in enumerate(unwritten):
        if problem:
            raise ValueError(f"--workdir {directory} cannot be written by process {index} ({problem}).")
    for index, files in enumerate(unseen):
        if files:
            other = files[0].rpartition("-")[2]
            raise ValueError(
                f"--workdir {directory} is not shared: process {index} does not see there what process "
                f"{other} wrote; name a directory on storage that all hosts share."
            )


def _missing(directory: pathlib.Path, names: list[str]) -> list[str]:
    """Which files are not there; waits for storage on which they appear late."""
    deadline = time.monotonic() + _SEEN_S
    while True:
        missing = [name for name in names if not (directory / name).exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def _start_watcher(here: Place, coordinator: str | None) -> None:
    """Starts this process's watcher, and connects it to that of process 0."""
    global _watcher
    command = [sys.executable, "-P", watcher.__file__, str(here.index), str(os.getpid())]
    pipe = subprocess.PIPE
    # A session of its own: what is sent to the group of the training is not for the watcher.
    _watcher = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    own = None
    if here.primary:
        heard = _hear()
        own = {
            "addresses": [[host, heard["port"]] for host in _own_hosts(coordinator)],
            "secret": heard["secret"],
        }
    of_first = exchange("address of the first watcher", own)[0]
    problem = None
    if not here.primary:
        _tell({"connect": of_first["addresses"], "secret": of_first["secret"]})
        problem = _hear()["problem"]
    for index, text in enumerate(exchange("connection of the watchers", problem)):
        if text and here.primary:
            print(
                f"note: the watcher of process {index} does not reach that of process 0 ({text}); should "
                "one of them end, the other learns it from jax alone, and later.",
                file=sys.stderr,
            )


def _own_hosts(coordinator: str | None) -> list[str]:
    """Names and addresses by which other hosts may reach this one, the likeliest first."""
    hosts = [] if coordinator is None else [coordinator.rpartition(":")[0].strip("[]")]
    hosts += [socket.gethostname(), socket.getfqdn()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(
                ("192.0.2.1", 9)
            )  # sends nothing: asks which of this host's addresses leads outside
            hosts.append(probe.getsockname()[0])
        except OSError:
            pass
    return list(dict.fromkeys(hosts))


def _tell(message: Json) -> None:
    assert _watcher is not None and _watcher.stdin is not None
    _watcher.stdin.write(json.dumps(message) + "\n")
    _watcher.stdin.flush()


def _hear() -> Json:
    assert _watcher is not None and _watcher.stdout is not None
    return json.loads(_watcher.stdout.readline() or "{}")


def announce_end(text: str, status: int, *, communication: bool) -> Json | None:
    """Tells the other processes that this one ends by an error, so that they end too.

    Args:
        text: the sentence that they print.
        status: the exit status that this process ends with.
        communication: whether the error may be the consequence of another process's end; then this waits for
            the news of that.

    Returns:
        the news of the process that ended first (`process`, `text`, `status`), which the watcher has printed
        already; None where this one is the first, or alone.
    """
    if _watcher is None:
        return None
    try:
        _tell({"failed": text, "status": status, "communication": communication})
        return _hear().get("news")
    except OSError:  # the watcher was killed: nobody is left to tell
        return None


def say_goodbye() -> None:
    """Tells the other processes that this one ends as it should."""
    if _watcher is not None:
        try:
            _tell({"done": True})
            _hear()
        except OSError:
            pass


def watched() -> bool:
    """Whether this process runs with others that must not wait for it in vain."""
    return _watcher is not None


def is_communication_error(error: BaseException) -> bool:
    """Whether an error is what a lost connection to another process looks like."""
    text = str(error).lower()
    words = (
        "gloo",
        "nccl",
        "coordination",
        "connection",
        "peer",
        "deadline_exceeded",
        "unavailable",
        "barrier",
    )
    return isinstance(error, jax.errors.JaxRuntimeError) or any(word in text for word in words)


class Signals:
    """SIGINT and SIGTERM as a wish to stop, which all processes of a run then follow together.

    For a run of several processes; alone, signals do what they always do, and so does a second signal.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if place().several and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, _: object) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
