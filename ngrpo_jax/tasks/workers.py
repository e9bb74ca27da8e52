"""Worker processes: started, asked, and ended with everything they have started.

Owns the parent's end of `math_worker`; it knows nothing of what is asked.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from . import math_worker

_SCRIPT = pathlib.Path(math_worker.__file__)


class Worker:
    """One grading process, started again if something kills it. Asked by one thread at a time."""

    def __init__(self, deadline_s: float, memory_mb: int):
        self._command = [sys.executable, "-P", str(_SCRIPT), str(deadline_s), str(memory_mb)]
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
                # A session of its own: Ctrl-C is for the parent alone, and the group can be ended as one.
                self._process = subprocess.Popen(
                    self._command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
                )
            return self._process

    def ask(self, question: Sequence[str]) -> bytes:
        """The worker's reply, a word of `math_worker`. Raises RuntimeError where none can be started."""
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        if not self._ready:
            self._wait_until_ready(process)
        try:
            process.stdin.write(json.dumps(list(question)).encode() + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if not reply:
            self._bury(process)
        return reply or math_worker.FAILED

    def stop(self) -> None:
        """End the process and its child, for good."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            self._bury(process)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != math_worker.READY:
            complaint = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            status = self._bury(process)
            raise RuntimeError(
                f"a grading worker does not start (exit status {status}: {complaint}); check that "
                f"math-verify is installed and that {self._command[-1]} MB of memory are enough for it"
            )
        self._ready = True

    def _bury(self, process: subprocess.Popen[bytes]) -> int:
        """End whatever is left of the process and its child and wait for it; its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        status = process.wait()
        with self._lock:
            self._process, self._ready = None, False
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a question that was never read
                pipe.close()
        return status
