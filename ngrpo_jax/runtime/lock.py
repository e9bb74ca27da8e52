"""One run a workdir: a lock file that names the process which holds it.

Owns the file. Two locks in one: the kernel's, which a process that dies loses at once, and the file itself,
which holds for other hosts too: made only where there is none, renewed every `RENEWED_S`, and stale after
`STALE_S`.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from ngrpo_jax.errors import StorageError, UserError, storage
from ngrpo_jax.runtime import ending

NAME = "lock.json"
RENEWED_S, STALE_S = 30.0, 180.0


@contextlib.contextmanager
def held(workdir: pathlib.Path, *, primary: bool = True) -> Iterator["Lock | None"]:
    """Holds the lock of a workdir, which is made if it is not there and removed again if it stays empty.

    Only the first process of a run holds it; the others get None.

    Raises:
        UserError: another process holds it; the sentence has its host, number and start.
    """
    if not primary:
        yield None
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    with storage(workdir, "written"):
        workdir.mkdir(parents=True, exist_ok=True)
    lock = Lock(workdir)

    def release() -> None:
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()

    with ending.last_act(release):
        yield lock


class Lock:
    """The lock of a workdir, from its making until `release`."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._path, self._ended = workdir / NAME, threading.Event()
        self._file = _taken(self._path)
        self._started = time.time()
        self._write()
        threading.Thread(target=self._renew, daemon=True, name="lock").start()

    def check(self) -> None:
        """StorageError where the workdir has vanished since, or holds another lock."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        raise StorageError(f"{self._path} is gone: the workdir was removed or replaced during the run.")

    def release(self) -> None:
        """Removes the file, unless it is another's by now, and gives the lock back."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            self.check()
            self._path.unlink()
        os.close(self._file)

    def _write(self) -> None:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": self._started}
        os.pwrite(self._file, json.dumps(holder).encode().ljust(256), 0)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def _taken(path: pathlib.Path) -> int:
    """The open lock file, which is this process's from now on. UserError where it is another's."""
    for _ in range(10):
        with storage(path, "written"):
            new = not path.exists()
            flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0)
            try:
                file = os.open(path, flags, 0o644)
            except FileExistsError:
                continue
        holder = _holder(file)
        free = _locked(file)
        if free is None or holder.get("host", socket.gethostname()) != socket.gethostname():
            # The kernel knows nothing of the holder, only its file. Hosts' clocks differ, and clocks jump.
            free = (new or abs(time.time() - os.fstat(file).st_mtime) > STALE_S) and free is not False
        if not free:
            os.close(file)
            raise UserError(_refusal(path, holder))
        # Its holder may have removed the file between `open` and `flock`: then this is no lock of anything.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return file
        os.close(file)
    raise StorageError(f"{path} cannot be locked: it is made and removed again and again.")


def _locked(file: int) -> bool | None:
    """Whether the kernel's lock of the file is this process's now; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _holder(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(path: pathlib.Path, holder: dict[str, Any]) -> str:
    since = ""
    if isinstance(holder.get("started"), int | float):
        since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(holder["started"]))
    return (
        f"a run is under way in {path.parent} already: process {holder.get('pid', '?')} on host "
        f"{holder.get('host', '?')}{since}; wait for its end, or use another --workdir."
    )
