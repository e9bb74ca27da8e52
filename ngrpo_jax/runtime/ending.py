"""How the processes of one run end together: the watcher beside this process, last words, signals.

Owns this side of the talk with the watcher (watcher.py). Must not know why a process ends, nor how the
processes found each other. Alone, a process has no watcher, and all of this does nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from . import watcher

Json = Any
Exchange = Callable[[str, Json], list[Json]]

_watcher: subprocess.Popen[str] | None = None


def start_watcher(index: int, coordinator: str | None, exchange: Exchange) -> None:
    """Starts the watcher of process `index`, and connects it to that of process 0.

    Args:
        coordinator: HOST:PORT of process 0 where a launcher gave it; the likeliest way to its watcher.
        exchange: `distributed.allgather`; every process of the run calls this.
    """
    global _watcher
    command = [sys.executable, "-P", watcher.__file__, str(index), str(os.getpid())]
    pipe = subprocess.PIPE
    # A session of its own: what is sent to the group of the training is not for the watcher.
    _watcher = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    own = None
    if index == 0:
        heard = _hear()
        own = {
            "addresses": [[host, heard["port"]] for host in _own_hosts(coordinator)],
            "secret": heard["secret"],
        }
    of_first = exchange("address of the first watcher", own)[0]
    problem = None
    if index > 0:
        _tell({"connect": of_first["addresses"], "secret": of_first["secret"]})
        problem = _hear()["problem"]
    for other, text in enumerate(exchange("connection of the watchers", problem)):
        if text and index == 0:
            print(
                f"note: the watcher of process {other} does not reach that of process 0 ({text}); should "
                "one of them end, the other learns it from jax alone, and later.",
                file=sys.stderr,
            )


def _own_hosts(coordinator: str | None) -> list[str]:
    """Names and addresses by which other hosts may reach this one, the likeliest first."""
    hosts = [] if coordinator is None else [coordinator.rpartition(":")[0].strip("[]")]
    hosts += [socket.gethostname(), socket.getfqdn()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: asks which of this host's addresses leads outside.
            probe.connect(("192.0.2.1", 9))
            hosts.append(probe.getsockname()[0])
        except OSError:
            pass
    return list(dict.fromkeys(hosts))


def _tell(message: Json) -> None:
    assert _watcher is not None and _watcher.stdin is not None
    _watcher.stdin.write(json.dumps(message) + "\n")
    _watcher.stdin.flush()


def _hear() -> Json:
    """What the watcher answers; OSError where it has ended."""
    assert _watcher is not None and _watcher.stdout is not None
    line = _watcher.stdout.readline()
    if not line:
        raise OSError("the watcher beside this process has ended: without it no other would learn of its end")
    return json.loads(line)


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
    import jax  # here alone: a command that needs no device starts without it

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
        if watched() and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, _: object) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
