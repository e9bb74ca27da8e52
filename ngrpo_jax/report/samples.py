"""samples.jsonl for a page: which groups are shown, as the script reads them, and what was mixed with what.

Owns the choice of groups, the form in which a page holds them, and the counts over all mixtures of the file,
which is read once, a row at a time: it may have hundreds of megabytes.
"""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ngrpo_jax import files
from ngrpo_jax.errors import require

MOST_BYTES = 3_000_000  # of the responses that a page holds, as they stand in the file
MOST_GROUPS = 200
# Edges of the counted cosines: narrow where the paper's mixtures are.
EDGES = (-1.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0001)
Row = dict[str, Any]


@dataclasses.dataclass
class Mixtures:
    """Counts over the mixtures of a file.

    Attributes:
      cosines: how many lie between two of EDGES.
      total, least, weight: sum of the cosines, the smallest, and the sum of the anchors' weights.
      anchors: text of an anchor -> times, the sum of its weights.
      partners: text of an anchor -> text of another candidate -> the sum of its weights.
    """

    cosines: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(EDGES) - 1, int))
    total: float = 0.0
    least: float = 1.0
    weight: float = 0.0
    anchors: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    partners: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """All mixtures."""
        return int(self.cosines.sum())

    def add(self, mixtures: list[list[Any]]) -> None:
        """Counts the mixtures of one response: [cosine, text, weight, text, weight, ...] each."""
        if not mixtures:
            return
        found = np.array([mixture[0] for mixture in mixtures])
        self.cosines += np.histogram(found, EDGES)[0]
        self.total, self.least = self.total + float(found.sum()), min(self.least, float(found.min()))
        for _, anchor, weight, *others in mixtures:
            self.weight += weight
            of_anchor = self.anchors.setdefault(anchor, [0, 0.0])
            of_anchor[0] += 1
            of_anchor[1] += weight
            partners = self.partners.setdefault(anchor, collections.Counter())
            for text, share in zip(others[::2], others[1::2], strict=True):
                partners[text] += share


@dataclasses.dataclass
class Samples:
    """What a page needs of a samples.jsonl: groups of rows in order, and counts over all rows."""

    shown: list[list[Row]] = dataclasses.field(default_factory=list)
    mixtures: Mixtures = dataclasses.field(default_factory=Mixtures)
    groups: int = 0
    responses: int = 0


def read(path: Path) -> Samples:
    """Reads a file of samples. UserError where a row holds no response; the sentence names its line."""
    found, places, at = Samples(), dict[tuple[Any, Any], list[tuple[int, int]]](), 0
    for line in files.read_jsonl(path, unfinished=True):
        row = line.value if isinstance(line.value, dict) else {}
        fault = f"{path} line {line.number} has no `response` text; remove that line."
        require(isinstance(row.get("response"), str), fault)
        places.setdefault((str(row.get("step")), str(row.get("id", line.number))), []).append((at, line.end))
        found.mixtures.add(row.get("mixtures") or [])
        found.responses, at = found.responses + 1, line.end
    found.groups = len(places)
    kept = [spans for _, spans in spread(list(places.items()))]
    with path.open("rb") as file:
        found.shown = [[_row_at(file, *span) for span in spans] for spans in kept]
    return found


def spread(groups: list[tuple[Any, list[tuple[int, int]]]]) -> list[tuple[Any, list[tuple[int, int]]]]:
    """As many groups as fit a page, evenly spaced over the run, the first and the last step among them."""
    for most in range(min(len(groups), MOST_GROUPS), 0, -1):
        chosen = [groups[round(i * (len(groups) - 1) / max(most - 1, 1))] for i in range(most)]
        if sum(end - start for _, spans in chosen for start, end in spans) <= MOST_BYTES:
            return chosen
    return groups[:1]


def _row_at(file: Any, start: int, end: int) -> Row:
    file.seek(start)
    return json.loads(file.read(end - start))


class Encoder:
    """Groups as the script reads them; candidates' texts are kept once, in `texts`."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def group(self, rows: list[Row]) -> dict[str, Any]:
        """A group: what its rows share, and its responses."""
        first = rows[0]
        return {
            **{name: first.get(name) for name in ("step", "id", "problem", "answer")},
            "responses": [self._response(row) for row in rows],
        }

    def _response(self, row: Row) -> dict[str, Any]:
        names = ("sample", "reward", "tokens", "stopped", "logprob", "cut")
        return {name: row[name] for name in names if name in row} | {"parts": self._parts(row)}

    def _parts(self, row: Row) -> list[Any]:
        """The text in pieces: plain, and [text, cosine, [candidate, weight, ...]] of each mixed token."""
        text, mixtures, at = row["response"], row.get("mixtures") or [], 0
        parts: list[Any] = []
        for number, (start, end) in enumerate(row.get("mixed") or []):
            start, end = max(at, min(int(start), len(text))), min(int(end), len(text))
            if start >= end:
                continue
            parts += [text[at:start]] if start > at else []
            parts.append(
                [text[start:end], *self._mixture(mixtures[number] if number < len(mixtures) else [])]
            )
            at = end
        return parts + ([text[at:]] if at < len(text) else [])

    def _mixture(self, mixture: list[Any]) -> list[Any]:
        if not mixture:
            return []
        cosine, *candidates = mixture
        numbered = [self.texts.setdefault(text, len(self.texts)) for text in candidates[::2]]
        return [cosine, [x for pair in zip(numbered, candidates[1::2], strict=True) for x in pair]]
