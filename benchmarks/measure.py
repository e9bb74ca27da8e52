"""Measuring: sides that run in turn, medians and intervals, what else the machine did, tables.

Owns the statistics of the benchmarks and the look of what they print. Knows nothing of what is measured, and
needs numpy and jax alone, so that it serves on a bare accelerator machine.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

QUIET_CORES = 0.15  # a round in which other processes used more than this is thrown away
_JUDGED_S = 1.0  # shorter rounds are not judged: the kernel counts in hundredths of a second
_MMAP_THRESHOLD = -3  # its name in mallopt(3)
_FEW = 20  # below so many rounds an interval is their range, else a bootstrap interval of the median


@dataclasses.dataclass(frozen=True)
class Interval:
    """A median with what lies around it: the 95 % bootstrap interval, or of few rounds the range."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} … {self.high:{spec}})"


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of every side in every kept round; all sides have the same number of rounds."""

    seconds: dict[str, np.ndarray]
    kept: tuple[int, ...]  # the rounds that count, of 0..rounds-1
    dropped: int
    others: float | None  # most cores that other processes used in a kept round; None: nobody knows

    def each(self, name: str) -> Interval:
        """Seconds of one side."""
        return interval(self.seconds[name])

    def ratio(self, above: str, below: str) -> Interval:
        """Seconds of `above` over those of `below`, round by round."""
        return interval(self.seconds[above] / self.seconds[below])

    def note(self) -> str:
        """How the rounds went, in a sentence."""
        rounds = len(next(iter(self.seconds.values())))
        kind = "range" if rounds < _FEW else "95 % bootstrap interval"
        dropped = f", {self.dropped} thrown away" if self.dropped else ""
        others = "" if self.others is None else f"; other processes used up to {self.others:.2f} cores"
        return f"alternating rounds: {rounds}{dropped}; median ({kind}){others}"


def interval(values: np.ndarray, resamples: int = 2000) -> Interval:
    """The median of values, and its 95 % bootstrap interval; of fewer than 20 values their range."""
    values = np.asarray(values, np.float64)
    if len(values) < _FEW:
        return Interval(float(np.median(values)), float(values.min()), float(values.max()))
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), (0.025, 0.975))
    return Interval(float(np.median(values)), float(low), float(high))


def alternate(
    sides: dict[str, Callable[[], float]],
    rounds: int,
    *,
    warmups: int = 1,
    rest_s: float = 0.0,
    pids: Sequence[int] = (),
) -> Timings:
    """Runs every side once a round, each round starting with the next one; a side returns its seconds.

    Args:
      sides: name -> a run.
      rounds: how many are kept where nothing disturbs; disturbed ones are not repeated.
      warmups: rounds before those, for compilation and caches.
      rest_s: pause before each run, for the threads of the side before to fall asleep.
      pids: processes that are part of the comparison (peers), so not "others".
    """
    names, kept, loads = list(sides), [], []
    for index in range(-warmups, rounds):
        before, start, row = _others(pids), time.perf_counter(), {}
        for place in range(len(names)):
            name = names[(index + place) % len(names)]
            time.sleep(rest_s)
            row[name] = sides[name]()
        wall, after = time.perf_counter() - start, _others(pids)
        load = None if before is None or after is None or wall < _JUDGED_S else (after - before) / wall
        if wall > 5 * _JUDGED_S:
            said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row.items())
            say(f"round {index + 1} of {rounds}: {said}" if index >= 0 else f"warm-up: {said}")
        if index >= 0:
            kept.append(row)
            loads.append(load)
    good = [i for i, load in enumerate(loads) if load is None or load <= QUIET_CORES]
    good = good or list(range(len(kept)))  # a machine that never was quiet: shown, and said in the note
    known = [max(loads[i], 0.0) for i in good if loads[i] is not None]
    seconds = {name: np.array([kept[i][name] for i in good]) for name in names}
    return Timings(seconds, tuple(good), len(kept) - len(good), max(known) if known else None)


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds until the arrays that `work` returns are there."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


class Report:
    """Tables as Markdown on stdout, each as soon as it is there, and finally all in a JSON file."""

    def __init__(self, title: str) -> None:
        self._content: dict[str, Any] = {"title": title, "machine": machine(), "tables": []}
        print(f"# {title}\n\n{self._content['machine']}", flush=True)

    def table(self, title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]], *notes: str) -> None:
        """Prints one table with its notes below; an Interval is a cell like any other."""
        rows = [list(row) for row in rows]
        lines = [headers, ["---"] * len(headers), *([_cell(value) for value in row] for row in rows)]
        print(f"\n## {title}\n", *("| " + " | ".join(line) + " |" for line in lines), sep="\n")
        print("", *notes, sep="\n", flush=True)
        plain = [[_plain(value) for value in row] for row in rows]
        self._content["tables"].append(
            {"title": title, "headers": list(headers), "rows": plain, "notes": list(notes)}
        )

    def save(self, path: str | os.PathLike[str] | None) -> None:
        """Writes everything to a JSON file, where one is asked for."""
        if path is not None:
            pathlib.Path(path).write_text(json.dumps(self._content, indent=1), encoding="utf-8")


def machine() -> str:
    """Date, device, processor and versions: what a figure is worthless without."""
    device = jax.devices()[0]
    parts = [
        datetime.date.today().isoformat(),
        f"{device.device_kind} × {jax.device_count()} ({device.platform})",
        f"{_processor()}, {os.cpu_count()} cores",
        f"jax {jax.__version__}",
        f"python {platform.python_version()}",
    ]
    return " · ".join(parts)


def say(text: str) -> None:
    """A line for whoever waits, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def return_freed_memory() -> None:
    """Lets the C library hand each large block back to the system as soon as it is freed (glibc).

    Otherwise it keeps blocks for later, and what the kernel counts grows with all that ever was in use.
    """
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def current_rss() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def reset_peak_rss() -> None:
    """Lets `peak_rss` count from now (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The most bytes of memory that this process has held since it began or the last reset (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().split("\n"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell a process's peak memory")


def _others(pids: Sequence[int]) -> float | None:
    """Seconds of processor time that neither this process nor `pids` used since boot; None off Linux."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for disks
    hertz = os.sysconf("SC_CLK_TCK")
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        busy -= int(fields[11]) + int(fields[12])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy / hertz - sum(u.ru_utime + u.ru_stime for u in used)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text().split("\n") if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Interval):
        return f"{value:.4g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Interval) else value
