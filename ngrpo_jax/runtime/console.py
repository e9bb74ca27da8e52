"""Console output: progress lines, tables, and numbers rounded with their unit.

Owns the layout of console output. Must not know what is counted.
"""

import codecs
import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TextIO

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_REWRITE_S = 0.2  # a terminal line is redrawn at most so often
_BEAT_S = 1.0  # ... and at least so often, while its work goes on
_said_at = -math.inf  # when this process last said something: imports may have taken long before it does
_SPELLED = ("-", "x", "-", "-", "-", "...", "->", "[", "]", "pi")
_ASCII = dict(zip("·×–−─…→⟦⟧π", _SPELLED, strict=True))


def say(text: str) -> None:
    """Prints a line at once; in a log, work that is under way then has its whole `every` seconds again."""
    global _said_at
    print(text, flush=True)
    _said_at = time.monotonic()


class Progress:
    """One line for a piece of work: done and total, rate, elapsed time and time left.

    On a terminal the line is rewritten in place, cut to the terminal's width: it never takes two rows.
    Elsewhere (a log file, a pipe) a new line is printed at most every `every` seconds, counted from whatever
    was last said there, if anything was: works that are shorter print nothing, unless they come one after the
    other. A thread prints it also while the work reports nothing, such as a compilation.

    Args:
        label: the name of the work, such as "rollout".
        total: the amount of work, in `unit`; None where it cannot be counted.
        unit: plural noun, such as "sequences".
        start: the amount that was done before (a resumed run); it does not count for the rate.
        every: seconds between lines where there is no terminal.
        keep: leave the last line on a terminal; otherwise it is wiped.
        enabled: False prints nothing, for the processes that are not the first.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "",
        *,
        start: int = 0,
        every: float = 8.0,
        keep: bool = True,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._label, self._total, self._unit, self._start = label, total, unit, start
        self._done, self._note = start, ""
        self._shared = stream is None
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._pause, self._silence = (_REWRITE_S, _BEAT_S) if self._terminal else (every, every)
        self._keep, self._enabled, self._clock = keep, enabled, clock
        self._began = self._printed_at = clock()
        if self._shared and not self._terminal:
            self._printed_at = _said_at
        self._printed: str | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        if self._enabled:
            threading.Thread(target=self._beat, name=self._label, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: int, note: str = "") -> None:
        """Sets how much is done, counted from zero; `note` comes at the end of the line."""
        with self._lock:
            self._done, self._note = done, note
            if self._enabled and self._quiet_s() >= self._pause:
                self._print(note)

    def count(self, done: int, total: int) -> None:
        """Sets how much is done of how much, where that is known only once the work has begun."""
        self._total = total
        self.update(done)

    def close(self) -> None:
        """Prints the last line, or wipes it; nothing where no line was printed before."""
        self._ended.set()
        with self._lock:
            if self._printed is None:
                return
            if self._terminal and not self._keep:
                self._stream.write("\r\x1b[K")
            else:
                self._print("")
                self._stream.write("\n" * self._terminal)
            self._stream.flush()
            self._printed = None

    def line(self, note: str = "") -> str:
        """The line for the present moment."""
        elapsed = self._clock() - self._began
        if self._total is None:
            return f"{self._label} · {format_seconds(elapsed)}"
        fresh = self._done - self._start
        parts = [f"{self._label} {format_count(self._done)}/{format_count(self._total)} {self._unit}"]
        if fresh > 0 and elapsed > 0:
            parts.append(format_rate(fresh / elapsed, self._unit))
        parts.append(format_seconds(elapsed))
        if fresh > 0 and self._done < self._total:
            parts.append(f"{format_seconds((self._total - self._done) * elapsed / fresh)} left")
        return " · ".join(parts + [note] * bool(note))

    def _beat(self) -> None:
        """Prints the line where nothing has printed it for too long."""
        while not self._ended.wait(_BEAT_S):
            with self._lock:
                if not self._ended.is_set() and self._quiet_s() >= self._silence:
                    self._print(self._note)

    def _quiet_s(self) -> float:
        """Seconds since the last line, of this work or, in a log, of the process."""
        said_at = _said_at if self._shared and not self._terminal else self._printed_at
        return self._clock() - max(self._printed_at, said_at)

    def _print(self, note: str) -> None:
        global _said_at
        text = self.line(note)
        self._printed_at = self._clock()
        if self._shared:
            _said_at = self._printed_at
        if text == self._printed:
            return
        self._printed = text
        if self._terminal:
            text = f"\r{shortened(text, width(self._stream))}\x1b[K"
        else:
            text += "\n"
        self._stream.write(text)
        self._stream.flush()


def width(stream: TextIO) -> int:
    """Columns of a terminal that a line may fill; 80 where it does not say."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return (columns or 80) - 1  # a character in the last column would already start the next row


def shortened(text: str, columns: int) -> str:
    """The text in at most so many columns, with an ellipsis where its end is cut off."""
    return text if len(text) <= columns else text[: max(columns - 1, 0)] + "…"


def spell_out_symbols() -> None:
    """Lets output go on where its encoding lacks a symbol of ours: it is spelled with what ASCII has."""

    def spelled(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lacking = error.object[error.start : error.end]
        return "".join(_ASCII.get(c) or ascii(c)[1:-1] for c in lacking), error.end

    codecs.register_error("ngrpo", spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ngrpo")


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Aligned text: header, rule, rows. Numbers are aligned to the right, text to the left; None is a dash.

    On a terminal that is too narrow the columns that do not fit come below, with the first one repeated.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    body = list(rows)
    cells = [[_cell(value) for value in row] for row in body]
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]
    right = [all(isinstance(v, int | float | None) for v in column) for column in zip(*body, strict=True)]
    right = right or [False] * len(headers)

    def aligned(texts: Sequence[str], columns: Sequence[int]) -> str:
        fitted = (texts[c].rjust(widths[c]) if right[c] else texts[c].ljust(widths[c]) for c in columns)
        return "  ".join(fitted).rstrip()

    def block(columns: Sequence[int]) -> str:
        rule = "  ".join("─" * widths[c] for c in columns)
        return "\n".join([aligned(headers, columns), rule, *(aligned(row, columns) for row in cells)])

    limit = width(sys.stdout) if sys.stdout.isatty() else sum(widths) + 2 * len(widths)
    return "\n\n".join(map(block, column_blocks(widths, limit)))


def column_blocks(widths: Sequence[int], limit: int) -> list[list[int]]:
    """The columns of a table in as many blocks as fit `limit`, each with column 0."""
    blocks: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        needed = sum(widths[c] + 2 for c in blocks[-1]) + widths[column]
        if needed > limit and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def format_seconds(seconds: float) -> str:
    """A duration with its two largest units: 0.42 s, 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller:02d} {name}"
    return f"{whole} s"


def format_count(number: float) -> str:
    """A number; from 10 000 on with an SI prefix and three digits: 12.3 k, 1.54 M."""
    if abs(number) < 10_000:
        return f"{number:.0f}" if number == int(number) else f"{number:.3g}"
    return _with_prefix(number, _SI)


def format_rate(rate: float, unit: str) -> str:
    """A rate, given in units a second; slow ones in units a minute or an hour: 4 steps/min."""
    for scale, name in ((1, "s"), (60, "min")):
        if rate * scale >= 1:
            return f"{format_count(float(f'{rate * scale:.3g}'))} {unit}/{name}"
    return f"{rate * 3600:.3g} {unit}/h"


def format_bytes(size: float) -> str:
    """A number of bytes with a prefix of powers of 1024: 512 B, 3.20 MiB, 14.9 GiB."""
    binary = ((1024.0**4, "Ti"), (1024.0**3, "Gi"), (1024.0**2, "Mi"), (1024.0, "Ki"))
    return (_with_prefix(size, binary) if abs(size) >= 1024 else f"{size:.0f} ") + "B"


def _with_prefix(number: float, prefixes: Sequence[tuple[float, str]]) -> str:
    # 0.9995 of the next prefix is rounded up to it: 999 999 is 1.00 M, not 1000 k.
    size, prefix = next(((s, p) for s, p in prefixes if abs(number) >= 0.9995 * s), prefixes[-1])
    scaled = number / size
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f} {prefix}"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return str(value)
