"""Which metrics share a chart, under which heading, with which labels.

Owns the table of panels (panels.toml), and the rule for metrics that are not in it. Draws nothing.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ngrpo_jax.files import toml_beside


class Panel(NamedTuple):
    """One chart. `series` maps a metric's name to its label; `kind` is "lines", "log" or "stack"."""

    title: str
    series: dict[str, str]
    unit: str = ""  # "", "%", "s" or the name of a unit
    kind: str = "lines"
    note: str = ""


class Section(NamedTuple):
    """Panels under one heading, with a sentence on what they show."""

    title: str
    note: str
    panels: tuple[Panel, ...]


def _section(title: str, note: str, panels: list[dict[str, Any]]) -> Section:
    return Section(title, note, tuple(Panel(**panel) for panel in panels))


SECTIONS = tuple(_section(**section) for section in toml_beside(__file__)["section"])
REST_TITLE = "Everything else"
# Metrics without a chart: "Time a step, by phase", "Mean reward" and "Verdicts a second" show as much.
_NO_CHART = {"time/step", "reward/std", "speed/reward_tokens"}


def present(keys: Iterable[str]) -> list[Section]:
    """The sections of the metrics `keys`, without empty panels; a metric of no panel gets one at the end."""
    have = set(keys)
    sections = [section._replace(panels=_with_metrics(section.panels, have)) for section in SECTIONS]
    known = {key for section in sections for panel in section.panels for key in panel.series}
    own = tuple(_own_panel(key) for key in sorted(have - known - _NO_CHART))
    sections.append(Section(REST_TITLE, "Metrics by their own names.", own))
    return [section for section in sections if section.panels]


def _with_metrics(panels: Iterable[Panel], have: set[str]) -> tuple[Panel, ...]:
    """The panels with the series of these metrics alone, less those that have none."""
    kept = (
        panel._replace(series={key: label for key, label in panel.series.items() if key in have})
        for panel in panels
    )
    return tuple(panel for panel in kept if panel.series)


def _own_panel(key: str) -> Panel:
    return Panel(key, {key: key.partition("/")[2] or key}, "s" if key.startswith("time/") else "")


def unit_of(key: str) -> str:
    """The unit of a metric: that of its panel."""
    return _UNITS.get(key) or _own_panel(key).unit


_UNITS = {key: panel.unit for section in SECTIONS for panel in section.panels for key in panel.series}
