"""Whether an answer is the gold, by the sorts of both; see docs/grading.md for the rules.

Values are compared by `algebra`. Where two sorts do not go together, or a reading is ambiguous, the answer is
not the gold.
"""

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from . import algebra
from .expressions import Node, letters, parse
from .forms import Tokens, UnreadableError, spell, split
from .intervals import as_region, joined, merged
from .sorts import (
    Answer,
    Chain,
    Choice,
    Collection,
    Matrix,
    Named,
    Numeral,
    Ordered,
    Ratio,
    Region,
    Relation,
    Scalar,
    Text,
)
from .units import DEGREE, PERCENT

_MAX_ITEMS = 60
_PARTS: dict[Any, Node] = {  # what one per cent and one degree are
    PERCENT: ("number", Fraction(1, 100), False),
    DEGREE: ("quotient", ("constant", "pi"), ("number", Fraction(180), False)),
}


class Verdict(NamedTuple):
    """Whether an answer is the gold, and the rule that decided it."""

    equal: bool
    rule: str


class Comparison:
    """Compares answers with golds, with the help of `fallback` for what was not read."""

    def __init__(self, fallback: Callable[[Tokens, Tokens], bool]):
        self._fallback = fallback
        self.used_algebra = False  # whether values were computed
        # In this order, for the answer and for the gold; None: the rule does not apply.
        self._rules: tuple[tuple[type[Answer], str, Callable[..., bool | None]], ...] = (
            (Choice, "letter", self._letter),
            (Named, "named value", self._named),
            (Chain, "chain of values", self._chain),
            (Collection, "named values", self._records),
            (Region, "interval", self._region),
            (Collection, "set", self._collection),
            (Ordered, "tuple", self._tuple),
            (Ratio, "ratio", self._ratio),
            (Text, "text", self._text),
            (Numeral, "numeral", lambda a, g: isinstance(g, Numeral) and a.key == g.key),
            (Matrix, "matrix", self._matrix),
            (Relation, "equation", self._relation),
            (Scalar, "value", self._scalar),
        )

    def compare(self, a: Answer, g: Answer) -> Verdict:
        """The verdict on an answer `a` held against the gold `g`."""
        if spell(a.tokens) == spell(g.tokens):
            return Verdict(bool(a.tokens), "same spelling")
        if isinstance(g, Named) and not isinstance(a, Named | Relation) and "+" in g.name:
            return Verdict(False, "equation")  # x + y = 5 is a line, of which 5 says nothing
        for sort, name, rule in self._rules:
            for one, other in ((a, g), (g, a)):
                if isinstance(one, sort) and (equal := rule(one, other)) is not None:
                    return Verdict(equal, name)
        sorts = {type(a), type(g)}
        if Answer not in sorts or sorts - {Answer, Scalar, Relation}:
            return Verdict(False, "different sorts")
        self.used_algebra = True
        return Verdict(self._fallback(a.tokens, g.tokens), "math-verify")

    def same(self, a: Answer, g: Answer) -> bool:
        """Whether `compare` finds them equal."""
        return self.compare(a, g).equal

    def _letter(self, one: Choice, other: Answer) -> bool:
        """The letter of an option against the same letter alone, or against the option's text."""
        letter = isinstance(other, Scalar) and other.node[0] == "letter"
        if isinstance(other, Choice):
            return one.letter == other.letter
        if isinstance(other, Scalar) and other.node == ("letter", one.letter):
            return True
        return one.value is not None and not letter and self.same(one.value, other)

    def _named(self, one: Named, other: Answer) -> bool:
        """A named value against another, against its value alone, or against an equation."""
        if isinstance(other, Named) and one.title == other.title:
            return self.same(one.value, other.value)
        records = self._records(one, other)
        if records is not None:
            return records
        if isinstance(other, Named | Relation):
            mine, theirs = _difference(one), _difference(other)
            return mine is not None and theirs is not None and self._proportional(mine, theirs) != 0
        if isinstance(other, Region) and other.name not in (None, one.name):
            return False
        return self.same(one.value, other)

    def _records(self, one: Answer, other: Answer) -> bool | None:
        """Several named values against others, by name, or against a tuple or list in the order of names."""
        mine, theirs = _record(one), _record(other)
        if mine is not None and theirs is not None:
            return mine.keys() == theirs.keys() and all(self.same(mine[n], theirs[n]) for n in mine)
        if mine is None or isinstance(one, Named) or not isinstance(other, Ordered | Collection):
            return None
        braces = isinstance(other, Collection) and other.braces
        return not braces and self._in_order([mine[name] for name in sorted(mine)], other.items)

    def _chain(self, one: Chain, other: Answer) -> bool:
        """Values that are said to be equal: they must be, and one of them must be the other answer."""
        first = one.values[0]
        consistent = all(
            self.same(value, first) or (about and self._about(value, first))
            for value, about in zip(one.values[1:], one.about[1:], strict=True)
        )
        return consistent and any(self.same(value, other) for value in one.values)

    def _about(self, value: Answer, exact: Answer) -> bool:
        """Whether a decimal is about an exact value."""
        if not isinstance(value, Scalar) or not isinstance(exact, Scalar):
            return False
        v, e = (algebra.real_value(x.node) for x in (value, exact))
        return v is not None and e is not None and abs(v - e) <= abs(e) * Fraction(1, 100)

    def _region(self, one: Answer, other: Answer) -> bool:
        """The same intervals, after those that meet are joined; the variables must not be two."""
        regions = [as_region(x) or joined(x, algebra.real_value) for x in (one, other)]
        a, g = regions
        if a is None or g is None or (a.name is not None and g.name is not None and a.name != g.name):
            return False
        mine, theirs = (merged(region.pieces, algebra.real_value) for region in (a, g))
        return len(mine) == len(theirs) and all(
            (p.low_closed, p.high_closed) == (q.low_closed, q.high_closed)
            and self._equal(p.low, q.low)
            and self._equal(p.high, q.high)
            for p, q in zip(mine, theirs, strict=True)
        )

    def _collection(self, one: Collection, other: Answer) -> bool:
        """Intervals joined, items in any order, a set of one item, a tuple's items in order."""
        if joined(one, algebra.real_value) is not None and isinstance(other, Ordered | Collection):
            return self._region(one, other)
        if isinstance(other, Collection):
            return self._same_items(one.items, other.items)
        if one.braces and len(one.items) == 1:
            return self.same(one.items[0], other)
        listed = not one.braces and not one.conjunction
        return (
            listed
            and isinstance(other, Ordered)
            and other.brackets == "()"
            and self._in_order(one.items, other.items)
        )

    def _same_items(self, some: Sequence[Answer], others: Sequence[Answer]) -> bool:
        """Each item of one is an item of the other."""
        left = list(others)
        if len(some) != len(left) or len(left) > _MAX_ITEMS:
            return False
        for item in some:
            found = next((i for i, other in enumerate(left) if self.same(item, other)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _tuple(self, one: Ordered, other: Answer) -> bool:
        return (
            isinstance(other, Ordered)
            and one.brackets == other.brackets
            and self._in_order(one.items, other.items)
        )

    def _in_order(self, some: Sequence[Answer], others: Sequence[Answer]) -> bool:
        return len(some) == len(others) and all(map(self.same, some, others))

    def _ratio(self, one: Ratio, other: Answer) -> bool:
        """In proportion; two times of the day are the same time; a ratio of two is its value."""
        if not isinstance(other, Ratio):
            quotient: Node = ("quotient", *one.nodes)
            return len(one.nodes) == 2 and isinstance(other, Scalar) and self._equal(quotient, other.node)
        pairs = list(zip(one.nodes, other.nodes, strict=False))
        if len(one.nodes) != len(other.nodes):
            return False
        if one.clock and other.clock:
            return all(self._equal(a, b) for a, b in pairs)
        products = ((("product", a, d), ("product", c, b)) for (a, b), (c, d) in itertools.pairwise(pairs))
        return all(self._equal(*both) for both in products)

    def _text(self, one: Text, other: Answer) -> bool:
        """Word by word; a word in italics is a product where the other side is written as one."""
        if isinstance(other, Text):
            return one.words == other.words
        if not isinstance(other, Scalar):
            return False
        if len(other.tokens) == 1 and other.tokens[0].kind == "word":
            return one.words == (other.tokens[0].text.lower(),)
        word = len(one.tokens) == 1 and one.tokens[0].kind == "word"
        return word and self._equal(parse(one.tokens), other.node)

    def _matrix(self, one: Matrix, other: Answer) -> bool:
        if not isinstance(other, Matrix) or one.kind != other.kind:
            return False
        return len(one.rows) == len(other.rows) and all(map(self._in_order, one.rows, other.rows))

    def _relation(self, one: Relation, other: Answer) -> bool | None:
        """Equations up to a constant factor, inequalities up to a positive one, congruences by residues."""
        if not isinstance(other, Relation):
            return None
        if one.relation != other.relation:
            return False
        if one.modulus is not None and other.modulus is not None:
            apart: Node = ("quotient", ("sum", one.right, ("minus", other.right)), one.modulus)
            same = self._equal(one.left, other.left) and self._equal(one.modulus, other.modulus)
            return same and algebra.is_whole(apart)
        factor = self._proportional(*(("sum", x.left, ("minus", x.right)) for x in (one, other)))
        return factor != 0 if one.relation in ("=", "ne") else factor > 0

    def _scalar(self, one: Scalar, other: Answer) -> bool | None:
        """Values with units of one dimension, or one without; an angle may be in radians, and 25 % be 1/4."""
        if not isinstance(other, Scalar):
            return None
        if one.unit is not None and other.unit is not None:
            sizes: list[Node] = [("number", x.unit.size, False) for x in (one, other) if x.unit is not None]
            if one.unit.size == other.unit.size:
                return one.unit.powers == other.unit.powers and self._equal(one.node, other.node)
            nodes = (("product", x.node, size) for x, size in zip((one, other), sizes, strict=True))
            return one.unit.powers == other.unit.powers and self._equal(*nodes)
        if self._equal(one.node, other.node):
            return True
        part = _PARTS.get(one.unit or other.unit)
        return part is not None and self._equal(
            *(("product", x.node, part) if x.unit is not None else x.node for x in (one, other))
        )

    def _equal(self, a: Node, g: Node) -> bool:
        self.used_algebra = True
        return algebra.equal(a, g)

    def _proportional(self, a: Node, g: Node) -> int:
        self.used_algebra = True
        return algebra.proportional(a, g)


def _record(answer: Answer) -> dict[str, Answer] | None:
    """Values by their names: of several named values, or of a tuple of names and one of values."""
    if isinstance(answer, Collection):
        record = {item.name: item.value for item in answer.items if isinstance(item, Named)}
        whole = len(record) == len(answer.items) and len(record) > 1
        return record if whole and not answer.braces else None
    if isinstance(answer, Named) and isinstance(answer.value, Ordered) and answer.name.startswith("("):
        names = answer.name[1:-1].split(",")
        pairs = zip(names, answer.value.items, strict=False)
        return dict(pairs) if len(names) == len(answer.value.items) else None
    return None


def _difference(answer: Answer) -> Node | None:
    """Left less right side of an equation; of a named value only where name or value is an expression."""
    if isinstance(answer, Relation):
        return ("sum", answer.left, ("minus", answer.right)) if answer.relation == "=" else None
    if not isinstance(answer, Named) or not isinstance(answer.value, Scalar):
        return None
    sides = split(answer.tokens, "=")
    try:
        expression = letters(answer.value.node) or "+" in answer.name
        return ("sum", parse(sides[0]), ("minus", parse(sides[-1]))) if expression else None
    except UnreadableError:
        return None
