"""Intervals of real numbers and their unions: from inequalities and brackets, joined, in a normal form.

Ends are ordered by their values, which a function gives (None for an expression with variables). Pure.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from .expressions import Node, parse
from .forms import Tokens, UnreadableError
from .names import name_of
from .sorts import INFINITY, Answer, Collection, Ordered, Piece, Region, Relation, Scalar

FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne"}
_MINUS_INFINITY: Node = ("minus", INFINITY)

Value = Callable[[Node], Any]


def inequality(tokens: Tokens, parts: list[Tokens], relations: list[str]) -> Answer:
    """x > 2, 0 < x < 3, |k| < 1 and x ne 2 as regions of their variable; anything else as a relation."""
    if len(parts) == 2 and _variable(parts[0]) is None and _variable(parts[1]) is not None:
        parts, relations = parts[::-1], [FLIPPED[relations[0]]]
    if len(parts) == 2:
        name = _variable(parts[0])
        if name is not None and name_of(parts[1]) is None:
            bars = parts[0][0].is_symbol("|")
            return Region(tokens, _bounded(bars, relations[0], parse(parts[1])), name)
        if relations[0] in (">", "ge"):
            parts, relations = parts[::-1], [FLIPPED[relations[0]]]
        return Relation(tokens, relations[0], parse(parts[0]), parse(parts[1]))
    if relations[0] in (">", "ge"):
        parts, relations = parts[::-1], [FLIPPED[relation] for relation in reversed(relations)]
    name = name_of(parts[1])
    if len(parts) != 3 or name is None or {*relations} - {"<", "le"}:
        raise UnreadableError("a chain of inequalities of no variable or of both directions")
    closed = [relation == "le" for relation in relations]
    return Region(tokens, (Piece(parse(parts[0]), parse(parts[2]), *closed),), name)


def _variable(tokens: Tokens) -> str | None:
    """The name of a variable or within the bars of an absolute value."""
    bars = len(tokens) > 2 and tokens[0].is_symbol("|") and tokens[-1].is_symbol("|")
    return name_of(tokens[1:-1] if bars else tokens)


def _bounded(bars: bool, relation: str, bound: Node) -> tuple[Piece, ...]:
    """The region of a variable, or with bars of its absolute value, by a relation to a bound."""
    closed = relation in ("le", "ge")
    if relation in ("<", "le"):
        low = ("minus", bound) if bars else _MINUS_INFINITY
        return (Piece(low, bound, closed and bars, closed),)
    above = Piece(bound, INFINITY, closed, False)
    if relation == "ne" and bars:
        raise UnreadableError("an absolute value that is not a number")
    if relation == "ne" or bars:
        below = bound if relation == "ne" else ("minus", bound)
        return (Piece(_MINUS_INFINITY, below, False, closed), above)
    return (above,)


def reals_without(tokens: Tokens, points: Sequence[Node] = ()) -> Region:
    """All real numbers but some."""
    ends = itertools.pairwise([_MINUS_INFINITY, *points, INFINITY])
    return Region(tokens, tuple(Piece(low, high, False, False) for low, high in ends))


def as_region(answer: Answer) -> Region | None:
    """A region, a pair in brackets or a set of numbers as a region."""
    if isinstance(answer, Region):
        return answer
    if not isinstance(answer, Ordered | Collection):
        return None
    nodes = [item.node for item in answer.items if isinstance(item, Scalar)]
    if len(nodes) < len(answer.items):
        return None
    if isinstance(answer, Collection):
        points = tuple(Piece(node, node, True, True) for node in nodes)
        return Region(answer.tokens, points) if answer.braces else None
    if len(nodes) != 2:
        return None
    closed = (answer.brackets[0] == "[", answer.brackets[1] == "]")
    return Region(answer.tokens, (Piece(nodes[0], nodes[1], *closed),))


def joined(answer: Answer, value: Value) -> Region | None:
    """Intervals joined by "or" or a comma as their union, those joined by "and" as their intersection.

    None for anything but several intervals of one variable.
    """
    if not isinstance(answer, Collection):
        return None
    regions = [item for item in answer.items if isinstance(item, Region)]
    if len(regions) < 2 or len(regions) < len(answer.items) or len({r.name for r in regions}) > 1:
        return None
    pieces = regions[0].pieces
    for region in regions[1:]:
        pieces = _intersected(pieces, region.pieces, value) if answer.conjunction else pieces + region.pieces
    return Region(answer.tokens, pieces, regions[0].name)


def _intersected(some: Sequence[Piece], others: Sequence[Piece], value: Value) -> tuple[Piece, ...]:
    """What two unions of intervals have in common; nothing where an end is no number."""
    pieces = []
    for a, b in itertools.product(some, others):
        ends = [value(node) for node in (a.low, b.low, a.high, b.high)]
        if None in ends:
            return ()
        # The later beginning and the earlier end; of equal ones the open one.
        first = a if (ends[0], not a.low_closed) >= (ends[1], not b.low_closed) else b
        last = a if (ends[2], a.high_closed) <= (ends[3], b.high_closed) else b
        piece = Piece(first.low, last.high, first.low_closed, last.high_closed)
        low, high = max(ends[:2]), min(ends[2:])
        if low < high or (low == high and piece.low_closed and piece.high_closed):
            pieces.append(piece)
    return tuple(pieces)


def merged(pieces: Sequence[Piece], value: Value) -> list[Piece]:
    """In order of their lower ends, those that overlap joined; as they are where an end is no number."""
    ends = {id(piece): (value(piece.low), value(piece.high)) for piece in pieces}
    if any(end is None for pair in ends.values() for end in pair):
        return list(pieces)
    done: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (ends[id(p)][0], not p.low_closed)):
        low, high = ends[id(piece)]
        last = done[-1] if done else None
        end = None if last is None else value(last.high)
        if last is None or low > end or (low == end and not (last.high_closed or piece.low_closed)):
            done.append(piece)
            continue
        later = piece if high > end or (high == end and piece.high_closed) else last
        done[-1] = Piece(last.low, later.high, last.low_closed, later.high_closed)
    return done
