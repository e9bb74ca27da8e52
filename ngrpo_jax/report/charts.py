"""A scatter of points as SVG, whose colours are those of the page. Must not know what the points are.

The curves are drawn in the browser (templates/charts.js); points of a plane need neither zoom nor hover.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

_WIDTH, _HEIGHT, _MARGIN = 760, 520, 24
_LETTER, _LINE = 7.2, 14  # the room of a label's letter, and its height
_PLACES = ((5, -4), (5, 12), (-5, -4), (-5, 12), (5, -18), (-5, -18), (5, 26), (-5, 26))


class Cloud(NamedTuple):
    """Points of one kind in a plane [N, 2], the number of their colour on the page, their radius."""

    label: str
    points: np.ndarray
    color: int
    radius: float


def scatter_chart(
    clouds: Sequence[Cloud],
    labels: Sequence[tuple[str, np.ndarray]],
    axis_labels: tuple[str, str],
    described: str,
) -> Markup:
    """Clouds of points, later ones over earlier ones, and text at some points [2], as SVG.

    A label is moved until it covers no other; one that finds no room is left out, its point has it as title.
    """
    everything = np.concatenate([cloud.points for cloud in clouds])
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = np.array([_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN]) / np.maximum(high - low, 1e-9)

    def place(points: np.ndarray) -> np.ndarray:
        at = _MARGIN + (points - low) * scale
        return np.stack([at[..., 0], _HEIGHT - at[..., 1]], axis=-1)

    groups = Markup("").join(_cloud(cloud, place(cloud.points)) for cloud in clouds)
    texts = Markup("").join(_labels([(text, place(point)) for text, point in labels]))
    return Markup(
        '<svg class="scatter" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}'
        '<text class="axis" x="{}" y="{}" text-anchor="end">{} →</text>'
        '<text class="axis" x="4" y="14">↑ {}</text></svg>'
    ).format(_WIDTH, _HEIGHT, described, groups, texts, _WIDTH - 4, _HEIGHT - 4, *axis_labels)


def _cloud(cloud: Cloud, points: np.ndarray) -> Markup:
    circles = Markup("").join(
        Markup('<circle cx="{}" cy="{}" r="{}"/>').format(f"{x:.1f}", f"{y:.1f}", cloud.radius)
        for x, y in points
    )
    return Markup('<g style="fill:var(--c{})" fill-opacity=".5">{}</g>').format(cloud.color, circles)


def _labels(labels: Sequence[tuple[str, np.ndarray]]) -> list[Markup]:
    taken: list[tuple[float, float, float, float]] = []
    found = []
    for text, (x, y) in labels:
        width = _LETTER * len(text)
        for dx, dy in _PLACES:
            left = x + dx if dx > 0 else x + dx - width
            box = (left, y + dy - _LINE, left + width, y + dy + 2)
            inside = box[0] >= 0 and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append(
                    Markup('<text x="{}" y="{}">{}</text>').format(f"{left:.1f}", f"{y + dy:.1f}", text)
                )
                break
        else:
            found.append(
                Markup('<circle cx="{}" cy="{}" r="4" fill-opacity="0"><title>{}</title></circle>').format(
                    f"{x:.1f}", f"{y:.1f}", text
                )
            )
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
