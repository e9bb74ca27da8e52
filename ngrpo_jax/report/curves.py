"""The curves of one run or of several, as the page's script reads them.

Owns which lines a panel has, where their points come from, and the JSON of both. Must not know how they are
drawn (templates/charts.js).
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ngrpo_jax.report import panels
from ngrpo_jax.report.numbers import quantity, short
from ngrpo_jax.report.workdir import Run
from ngrpo_jax.schema import flatten


class Points(NamedTuple):
    """Values over steps; `low` and `high` bound a band around them."""

    steps: tuple[int, ...]
    values: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a panel: its name, its points, the number of its colour."""

    label: str
    points: Points
    color: int


@dataclasses.dataclass
class Axes:
    """The steps of all curves of a page, each list of them kept once."""

    known: dict[tuple[int, ...], int] = dataclasses.field(default_factory=dict)

    def number(self, steps: tuple[int, ...]) -> int:
        """The place of these steps in the page's list."""
        return self.known.setdefault(steps, len(self.known))


def points(run: Run, key: str) -> Points:
    """A metric of a run; held-out ones with the step before training, the last one, and their intervals."""
    name = key.removeprefix("eval/")
    if key == name or not run.evaluations:
        steps, values = run.values(key)
        return Points(tuple(steps), list(values))
    found = [row for row in run.evaluations if isinstance(row.get(name), int | float)]
    steps_of = tuple(row["step"] for row in found)
    bounds = [row.get("intervals", {}).get(name) for row in found]
    low, high = ([None if b is None else b[side] for b in bounds] for side in (0, 1))
    if not any(bounds):
        return Points(steps_of, [row[name] for row in found])
    return Points(steps_of, [row[name] for row in found], low, high)


def samples_and_k(run: Run) -> tuple[int | None, int | None]:
    """n of Mean@n and the largest k of Pass@k in a run's settings; None where they are unknown."""
    settings = flatten(run.config)
    n, k = settings.get("eval.samples"), settings.get("eval.pass_k")
    return n, max(k) if isinstance(k, list) and k else k or None


def label_of(run: Run, label: str) -> str:
    """A metric's label with the run's numbers: Mean@8 for Mean@n."""
    n, k = samples_and_k(run)
    return label.replace("@n", f"@{n or 'n'}").replace("Pass@k", f"Pass@{k or 'k'}")


def of_run(run: Run) -> list[tuple[panels.Section, list[tuple[panels.Panel, list[Line]]]]]:
    """The panels of one run under their headings, a line for each metric of a panel."""

    def lines(panel: panels.Panel) -> list[Line]:
        named = panel.series.items()
        return [Line(label_of(run, label), points(run, key), n) for n, (key, label) in enumerate(named)]

    found = panels.present(run.keys)
    return [(section, [(panel, lines(panel)) for panel in section.panels]) for section in found]


def as_json(panel: panels.Panel, lines: Sequence[Line], axes: Axes) -> dict[str, Any]:
    """What the script draws of a panel."""
    found = {
        "unit": panel.unit,
        "kind": panel.kind,
        "lines": [_line(line, axes) for line in lines],
    }
    top = _top(panel, lines)
    return found if top is None else found | {"top": top}


def _top(panel: panels.Panel, lines: Sequence[Line]) -> float | None:
    """Where the axis of a time ends if a few steps took far longer than the others; None elsewhere."""
    values = [v for line in lines for v in line.points.values if v is not None]
    if panel.unit != "s" or panel.kind == "stack" or not values:
        return None
    middle = statistics.median(values)
    largest = max(values + [v for line in lines for v in line.points.high or () if v is not None])
    return short(4 * middle) if largest > 6 * middle > 0 else None


def _line(line: Line, axes: Axes) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": line.label,
        "color": line.color,
        "x": axes.number(line.points.steps),
        "y": [short(value) for value in line.points.values],
    }
    if line.points.low is not None and line.points.high is not None:
        found["low"] = [short(value) for value in line.points.low]
        found["high"] = [short(value) for value in line.points.high]
    return found


def described(panel: panels.Panel, lines: Sequence[Line]) -> str:
    """A panel's curves in words, for screen readers."""
    ends = (
        f"{line.label} from {quantity(line.points.values[0], panel.unit)} to "
        f"{quantity(line.points.values[-1], panel.unit)}"
        for line in lines
        if line.points.values
    )
    return f"{panel.title}: {'; '.join(ends)}"


def legend(panel: panels.Panel, lines: Sequence[Line]) -> list[Mapping[str, Any]]:
    """The named lines of a panel with their last values."""
    return [
        {"color": line.color, "label": line.label, "last": quantity(line.points.values[-1], panel.unit)}
        for line in lines
        if line.points.values
    ]
