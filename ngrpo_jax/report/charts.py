"""Charts as SVG text for an HTML page. Owns how charts look; must not know what a metric means.

Matplotlib draws with its SVG backend, which needs no display. Text stays text in the SVG, so that it has the
page's font, and equal data give equal bytes.
"""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ngrpo_jax.runtime.console import format_count

# The hues of Okabe and Ito, darkened for lines on white: distinguishable with any colour vision.
COLORS = ("#2563c9", "#d9730d", "#0e8f76", "#a5447f", "#6b7280")
_INK, _GRID = "#5b6470", "#e8eaee"
_SIZE = (4.4, 2.3)  # inches; the page scales a chart to the width of its panel
_SMOOTH_FROM = 30  # a line of at least so many points gets a running mean


class Series(NamedTuple):
    """One line: its steps and values, and its colour."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    color: str


class Cloud(NamedTuple):
    """Points of one kind in a plane [N, 2], their colour and their size in square points."""

    label: str
    points: np.ndarray
    color: str
    size: float


def window(points: int) -> int:
    """Width of the running mean of a line with so many points; 1 means that none is drawn."""
    return max(3, points // 15) if points >= _SMOOTH_FROM else 1


def line_chart(series: Sequence[Series], *, unit: str = "", log: bool = False) -> str:
    """Lines over steps, as SVG; a long one is thin, with its running mean in bold."""
    figure, axes = _axes(unit)
    for one in series:
        steps, values = np.asarray(one.steps), np.asarray(one.values, dtype=float)
        width = window(len(values))
        if width > 1:
            axes.plot(steps, values, color=one.color, linewidth=0.8, alpha=0.35)
            axes.plot(steps, running_mean(values, width), color=one.color, linewidth=1.9)
        else:
            marker = 4.0 if len(values) <= 12 else 0.0
            axes.plot(steps, values, color=one.color, linewidth=1.7, marker="o", markersize=marker)
    _set_steps(axes, {step for one in series for step in one.steps})
    if log and all(value > 0 for one in series for value in one.values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, unit)))
    else:
        _set_range(axes, [value for one in series for value in one.values])
    return _svg(figure)


def stack_chart(series: Sequence[Series], *, unit: str = "") -> str:
    """Stacked areas over the steps that all series have, as SVG."""
    figure, axes = _axes(unit)
    steps = sorted(set.intersection(*(set(one.steps) for one in series)))
    found = [dict(zip(one.steps, one.values, strict=True)) for one in series]
    layers = [[values[step] for step in steps] for values in found]
    colors = [one.color for one in series]
    if len(steps) > 1:
        axes.stackplot(steps, layers, colors=colors, linewidth=0, alpha=0.85)
        axes.set_xlim(steps[0], steps[-1])
    else:
        bottom = 0.0
        for values, color in zip(layers, colors, strict=True):
            axes.bar(steps, values, 0.5, bottom=bottom, color=color, alpha=0.85)
            bottom += sum(values)
        _set_steps(axes, set(steps))
    axes.set_ylim(bottom=0)
    return _svg(figure)


def scatter_chart(
    clouds: Sequence[Cloud], labels: Sequence[tuple[str, np.ndarray]], axis_labels: tuple[str, str]
) -> str:
    """Clouds of points, later ones drawn over earlier ones, with text at some points [2], as SVG."""
    figure, axes = _axes("")
    figure.set_size_inches(7.2, 5.0)
    for cloud in clouds:
        axes.scatter(
            cloud.points[:, 0], cloud.points[:, 1], s=cloud.size, color=cloud.color, alpha=0.55, linewidths=0
        )
    for text, (x, y) in labels:
        # Matplotlib would read a dollar sign as the start of a formula.
        name = text.replace("$", r"\$")
        axes.annotate(name, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(axis_labels[0], fontsize=9, color=_INK)
    axes.set_ylabel(axis_labels[1], fontsize=9, color=_INK)
    return _svg(figure)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` points, at both ends over fewer; [T] -> [T]."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def tick(value: float, unit: str) -> str:
    """An axis label: the whole value, without rounding noise."""
    plain = format_count(value) if abs(value) >= 10_000 else f"{value:.4g}"
    return (f"{100 * value:.4g} %" if unit == "%" else plain).replace("-", "\u2212")


def _axes(unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c6ccd4")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, unit)))
    axes.margins(x=0.02)
    return figure, axes


def _set_steps(axes: Axes, steps: set[int]) -> None:
    """Few steps get a tick each: matplotlib's own choice would put ticks between them."""
    if len(steps) <= 5:
        axes.set_xticks(sorted(steps))
        axes.set_xlim(min(steps) - 0.5, max(steps) + 0.5)


def _set_range(axes: Axes, values: Sequence[float]) -> None:
    """Leaves room around the data; a constant line is drawn in the middle, without its rounding noise."""
    low, high = min(values), max(values)
    spread = high - low
    room = 0.08 * spread if spread > 1e-6 * abs(high) else 0.05 * abs(high) or 1.0
    floor = low - room
    # The axis of a quantity that is never negative does not go below zero.
    axes.set_ylim(0 if low >= 0 > floor else floor, high + room)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ngrpo", "path.simplify": True}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)  # of the whole drawing
    # Charts share a page: ids that nothing refers to are dropped, since they could repeat in another chart.
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()
