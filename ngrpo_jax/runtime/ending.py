"""How a process ends: at once when it fails or a signal comes early, after a step where one is to be kept.

Owns the signals of a run and the exit of a process that runs with others. Must not know why a process ends.
Must not import JAX either: a command may fail before it needs it, and a signal may come during the import.
jax's coordination service (distributed.py) and the launcher end the other processes.

A thread hears the signals, since the main thread may be in XLA's compiler for minutes. It ends the process
without unwinding: the interpreter's own end, with XLA's threads at work, may be a segmentation fault.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, Self

from ngrpo_jax.errors import Preempted, UserError

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
        # jax's preemption service has taken SIGTERM, and nothing would follow from it.
        signal.signal(signal.SIGTERM, _ignore if _heard else signal.SIG_DFL)


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


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_heard = False  # whether `listen` has been called
_last_words: Callable[[], str] = "nothing was written.".strip
_last_acts: list[Callable[[], None]] = []
_deferred: "Deferred | None" = None
_received = 0  # the signal that was heard while a step was under way; 0 before


def listen() -> None:
    """From here on SIGINT and SIGTERM end this process with a sentence and 128 + their number.

    At once, or after a step where `Deferred` says so; a second signal ends it at once in any case.
    """
    global _heard
    if _heard:
        return
    _heard = True
    heard, told = os.pipe()
    os.set_blocking(told, False)
    threading.Thread(target=_hear, args=(heard,), daemon=True, name="signals").start()
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _ignore)


def last_words(sentence: Callable[[], str]) -> None:
    """What is said after "stopped by SIGTERM; ": what is on disk, and how to go on."""
    global _last_words
    _last_words = sentence


@contextlib.contextmanager
def last_act(act: Callable[[], None]) -> Iterator[None]:
    """Does `act` at the end of the block, or when a signal ends the process within it."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)
        act()


def received() -> int:
    """The number of a signal that this process heard while a step was under way; 0 for none."""
    return _received


def preempted(number: int) -> NoReturn:
    """Ends this process because of a signal, with the sentence on how to go on.

    The first of several processes waits a little: jax aborts those that still run once it has ended.
    """
    # Not through sys.stderr: the main thread may be within it.
    os.write(2, f"\n{Preempted(number, _last_words())}\n".encode())
    if _several and _primary:
        time.sleep(_AGREEMENT_S)
    leave(128 + number)


def finish() -> None:
    """Ends a process alone that listens: the interpreter's own end would hear no signal any more."""
    if _heard and not _several:
        leave(0)


def leave(status: int) -> NoReturn:
    """Ends the process without the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Deferred:
    """A block in which a signal is a wish to stop: `received` holds its number, 0 before.

    The block's owner ends it when what is under way is done. It is not waited for where that would take more
    than `grace_s` from the signal on: `pause` then raises `Abandoned` in a process alone, and where nothing
    would be lost (`kept`) the process ends at once. Processes of several do the same steps, and always wait.

    Attributes:
        ends_at: when what is under way is done, by `time.monotonic`; inf where that is unknown.
    """

    def __init__(self, grace_s: float, kept: Callable[[], bool]) -> None:
        """`kept`: whether all that is finished is on disk."""
        self.received, self._until = 0, 0.0
        self._grace_s, self._kept = grace_s, kept
        self.ends_at = math.inf

    def __enter__(self) -> Self:
        global _deferred
        _deferred = self
        return self

    def __exit__(self, *_: object) -> None:
        global _deferred
        _deferred = None

    def receive(self, number: int) -> bool:
        """Notes a signal; whether the process need not go on."""
        self.received, self._until = number, time.monotonic() + self._grace_s
        return self.too_late() and self._kept()

    def too_late(self) -> bool:
        """Whether what is under way is to be abandoned."""
        if not self.received or several():
            return False
        return self.ends_at > self._until

    @contextlib.contextmanager
    def expected(self, what: str, seconds: dict[str, float]) -> Iterator[None]:
        """A block that takes about `seconds[what]`, where its own time is noted."""
        began = time.monotonic()
        self.ends_at = began + seconds[what]
        yield
        seconds[what] = time.monotonic() - began
        self.ends_at = math.inf


class Abandoned(BaseException):
    """Raised by `pause`; no error, so that nothing on the way treats it as one."""


def pause() -> None:
    """Called between two parts of long work: Abandoned where a signal came and the rest takes too long."""
    if _deferred is not None and _deferred.too_late():
        raise Abandoned


def _ignore(number: int, frame: object) -> None:
    """The handler in the main thread. With it Python writes the signal's number for `_hear`, and goes on."""


def _hear(pipe: int) -> None:
    global _received
    while True:
        number = os.read(pipe, 1)[0]
        deferred = _deferred
        if number not in _SIGNALS:
            continue
        if deferred is not None and not deferred.received:
            _received = number
            if not deferred.receive(number):
                continue
        for act in reversed(_last_acts):
            with contextlib.suppress(Exception):
                act()
        preempted(number)
