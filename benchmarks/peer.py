"""The near end of a peer: another program's process that is asked in JSON lines and answers in them.

A peer needs libraries that this project does not have, so it runs under an interpreter of its own and lives
as long as the benchmark: both sides can then take turns within one run. Must not know what a peer computes.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).parent / "peers"


class Peer:
    """A running peer. Use it in a `with`; `ask` waits for the answer."""

    def __init__(self, python: str, script: str | os.PathLike[str]) -> None:
        """Starts `script` (a file of benchmarks/peers, or a path) under the interpreter `python`.

        Raises:
          ValueError: no such interpreter.
        """
        if shutil.which(python) is None:
            raise ValueError(f"{python} is no program; name the python of the peer's environment")
        self._name = pathlib.Path(script).stem
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        offline = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | offline
        self._process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()  # the end of its requests is the end of a peer
            self._process.wait(timeout=30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    @property
    def pid(self) -> int:
        """For the bookkeeping of whose processor time is whose."""
        return self._process.pid

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Sends one request and returns the answer.

        Raises:
          RuntimeError: the peer answered with an error, or ended; with its last words.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = self._errors.read().strip().split("\n")[-1]
            raise RuntimeError(f"the peer {self._name} ended during {op!r}; its last words: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the peer {self._name} failed in {op!r}: {answer['error']}")
        return answer
