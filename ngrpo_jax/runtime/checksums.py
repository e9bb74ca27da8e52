"""Checksums of all files of a folder, kept in one more file there, and the file that does not fit its own.

Owns that file. Must not know what the others hold. CRC-32 finds every error of up to 32 neighbouring bits,
and of the others all but one in 2^32; zlib computes it without Python's lock, so that threads share a file.
"""

import json
import os
import pathlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

NAME = "checksums.json"
_BLOCK = 16 * 2**20  # bytes that one thread reads and sums up at a time
_THREADS = min(8, os.cpu_count() or 1)


def write(folder: pathlib.Path) -> None:
    """Writes the checksums of all files below `folder`, by their paths from there."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = {name: _sums(folder / name) for name in names if name != NAME}
    document = {"crc32": files, "own": _own(files)}
    (folder / NAME).write_text(json.dumps(document), encoding="utf-8")


def fault(folder: pathlib.Path, *, share: tuple[int, int] = (0, 1), only: tuple[str, ...] = ()) -> str | None:
    """The first file that `write` saw otherwise, such as "state/d/ab (checksum)"; None: all are as they were.

    Args:
        share: (i, n): looks at every n-th file from the i-th on, one of n processes.
        only: looks at these names alone, as far as the folder had them.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        document = json.loads((folder / NAME).read_bytes())
        files: dict[str, list[Any]] = document["crc32"]
        whole = document["own"] == _own(files)
    except FileNotFoundError:
        return f"{NAME} (missing)"
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        return f"{NAME} (checksum)"
    for name in list(files)[share[0] :: share[1]]:
        if only and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} (missing)"
        # The size first: a file that is cut off is not read.
        if path.stat().st_size != files[name][0] or _sums(path) != files[name]:
            return f"{name} (checksum)"
    return None


def _sums(path: pathlib.Path) -> list[Any]:
    """[bytes of the file, the checksum of each block]."""
    size = path.stat().st_size
    starts = range(0, size, _BLOCK)

    def block(start: int) -> int:
        with path.open("rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(_BLOCK))

    if len(starts) < 2:
        return [size, [block(start) for start in starts]]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [size, list(threads.map(block, starts))]


def _own(files: dict[str, list[Any]]) -> int:
    return zlib.crc32(json.dumps(files).encode())
