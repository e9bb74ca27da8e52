"""Grading processes: started, asked, replaced, and ended with everything they have started.

Owns the parent's end of the pipe to `grading.process`. Must not know what a question means.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from .grading import process
from .grading.process import Reply

_ROOT = pathlib.Path(__file__).parents[
    2
]  # so that the process finds this package wherever it was imported from
_GRACE_SECONDS = 0.5  # beyond the deadline, for a process that does not end its question itself
_START_SECONDS = 70.0
_END_SECONDS = 2.0


class Worker:
    """One grading process, started again if something ends it. Asked by one thread at a time."""

    def __init__(self, deadline_s: float, memory_mb: int):
        self._command = [sys.executable, "-P", "-m", process.__name__, str(deadline_s), str(memory_mb)]
        self._patience_s = deadline_s + _GRACE_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._closed = False
        self._lock = threading.Lock()  # `stop` may come from another thread than `ask`

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process, if it does not run, without waiting until it is ready."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the grader is closed")
            if self._process is None:
                pipe = subprocess.PIPE
                path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
                # A session of its own: Ctrl-C is for the parent alone, and the group can be ended as one.
                self._process = subprocess.Popen(
                    self._command,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=pipe,
                    start_new_session=True,
                    env=os.environ | {"PYTHONPATH": path},
                )
            return self._process

    def ask(self, question: Sequence[str]) -> Reply:
        """The reply to a question. Raises RuntimeError where no process can be started.

        A process that gives no reply soon after the deadline (something has stopped it) is replaced, and its
        question has timed out.
        """
        running = self.start()
        assert running.stdin is not None
        if not self._ready:
            self._wait_until_ready(running)
        try:
            running.stdin.write(json.dumps(list(question)).encode() + b"\n")
            running.stdin.flush()
            line = _read_line(running, self._patience_s)
        except BrokenPipeError:
            line = b""
        if line:
            return Reply(*json.loads(line))
        self._end(running)
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self.start()
        return Reply(False, process.FAILED if line is not None else process.TIMEOUT)

    def stop(self) -> None:
        """End the process and its child, for good."""
        with self._lock:
            self._closed = True
            running = self._process
        if running is not None:
            self._end(running)

    def _wait_until_ready(self, running: subprocess.Popen[bytes]) -> None:
        assert running.stderr is not None
        if _read_line(running, _START_SECONDS) != process.READY:
            os.killpg(running.pid, signal.SIGCONT)
            complaint = ""
            if running.poll() is not None or _read_line(running, _END_SECONDS) == b"":
                complaint = running.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            status = self._end(running)
            raise RuntimeError(
                f"a grading worker does not start (exit status {status}: {complaint}); check that "
                f"math-verify is installed and that {self._command[-1]} MB of memory are enough for it"
            )
        self._ready = True

    def _end(self, running: subprocess.Popen[bytes]) -> int:
        """End whatever is left of the process and its child and wait for it; its exit status."""
        for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process gets its SIGTERM when it goes on
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, number)
        try:
            status = running.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            status = running.wait()
        with self._lock:
            self._process, self._ready = None, False
        for pipe in (running.stdin, running.stdout, running.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a question that was never read
                pipe.close()
        return status


def _read_line(running: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """A line that the process writes in time; b"" where it has ended, None where it is late."""
    assert running.stdout is not None
    poll = select.poll()
    poll.register(running.stdout, select.POLLIN | select.POLLHUP)
    if not poll.poll(1000 * seconds):
        return None
    return running.stdout.readline()
