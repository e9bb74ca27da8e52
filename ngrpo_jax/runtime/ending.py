"""How a process of several ends: at once when it fails, after a step when a signal asks for it.

Owns the signals of a run and the exit of a process that runs with others. Must not know why a process ends.
Must not import JAX either: a command may fail before it needs it. jax's coordination service
(distributed.py) and the launcher end the other processes. A process alone ends as Python does.
"""

import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn, Self

from ngrpo_jax.errors import UserError

# jax takes a process without a heartbeat for this long for dead: it names the process on stderr of the others
# and aborts them. Long enough for a host that stalls; all have to end within a minute.
HEARTBEAT_S = 45
_AGREEMENT_S = 5.0  # process 0 ends last where all fail alike: jax aborts the others once it has ended
# What an error of jax's runtime contains where another process has ended.
_LOST_CONNECTION = ("gloo", "nccl", "coordination", "socket closed", "connection closed", "connection reset")

_several = _primary = False


def joined(*, several: bool, primary: bool) -> None:
    """Notes whether this process runs with others, and whether it is the first of them."""
    global _several, _primary
    _several, _primary = several, primary
    if several:
        # jax's preemption service has taken SIGTERM, and nothing would follow from it. Until `Signals`, the
        # signal ends the process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def several() -> bool:
    """Whether this process runs with others, which must not wait for it after it has ended."""
    return _several


def shutdown(status: int, *, lost_connection: bool) -> NoReturn:
    """Ends this process of several at once, after its error has been printed.

    Nothing is unwound, and no exit handler runs: what would be closed on the way may wait for the other
    processes, which wait for this one.

    Args:
        lost_connection: another process has ended before this one, and jax is given the time to name it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if lost_connection:
        time.sleep(HEARTBEAT_S + 5)  # jax aborts this process meanwhile
    elif _primary:
        time.sleep(_AGREEMENT_S)
    os._exit(status)


def lost_connection(error: BaseException) -> str | None:
    """The sentence for an error by which jax reports that another process has ended; None for others."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError) or not any(word in text.lower() for word in _LOST_CONNECTION):
        return None
    return (
        f"the connection to another process of this run is lost ({text[:200]}); within {HEARTBEAT_S} s jax "
        "names the process (process 0 as the coordination service), and its log says why it ended."
    )


class Signals:
    """SIGINT and SIGTERM as a wish to stop, which all processes of a run follow together after a step.

    For a run of several processes; alone, signals do what they always do, and so does a second signal.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if several() and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, _: object) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
