"""The sorts of answers: number or expression, named value, equation, interval, set, tuple, ratio, ...

Data alone: `reading` makes answers and `comparison` compares them. `Answer` is the sort of what was not read.
"""

import dataclasses
from typing import ClassVar

from .expressions import Node
from .forms import Tokens
from .units import Unit

INFINITY: Node = ("constant", "infinity")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer as read; `tokens` is its normal form."""

    tokens: Tokens
    sort: ClassVar[str] = "unread"


@dataclasses.dataclass(frozen=True)
class Scalar(Answer):
    """A number or expression, with a unit or without; an angle in degrees has the unit degree."""

    node: Node
    unit: Unit | None = None
    sort: ClassVar[str] = "number or expression"


@dataclasses.dataclass(frozen=True)
class Named(Answer):
    """A value with its name: x = 5, f(2) = 12, m + n = 10, or (x, y) = (1, 2)."""

    name: str
    value: Answer
    sort: ClassVar[str] = "named value"

    @property
    def title(self) -> str:
        """The name; y and f(x) are one."""
        return "y" if self.name == "f ( x )" else self.name


@dataclasses.dataclass(frozen=True)
class Chain(Answer):
    """Values that are said to be equal, 2 + 3 = 5, or about equal, pi = 3.14 or so; `about` = the latter."""

    values: tuple[Answer, ...]
    about: tuple[bool, ...]
    sort: ClassVar[str] = "chain of values"


@dataclasses.dataclass(frozen=True)
class Relation(Answer):
    """An equation or inequality that names no value: 2x + 3y = 6; the relation is =, <, le, ne or equiv."""

    relation: str
    left: Node
    right: Node
    modulus: Node | None = None
    sort: ClassVar[str] = "equation or inequality"


@dataclasses.dataclass(frozen=True)
class Piece:
    """An interval of real numbers."""

    low: Node
    high: Node
    low_closed: bool
    high_closed: bool


@dataclasses.dataclass(frozen=True)
class Region(Answer):
    """A union of intervals: an inequality, a set-builder, a union, the reals; `name` of the variable."""

    pieces: tuple[Piece, ...]
    name: str | None = None
    sort: ClassVar[str] = "interval or inequality"


@dataclasses.dataclass(frozen=True)
class Collection(Answer):
    """Several answers without order: a list, alternatives joined by "or", a set in braces."""

    items: tuple[Answer, ...]
    braces: bool = False
    conjunction: bool = False  # joined by "and"
    sort: ClassVar[str] = "list or set"


@dataclasses.dataclass(frozen=True)
class Ordered(Answer):
    """Several answers in brackets: a point, a tuple, or an interval."""

    brackets: str
    items: tuple[Answer, ...]
    sort: ClassVar[str] = "tuple or interval"


@dataclasses.dataclass(frozen=True)
class Ratio(Answer):
    """a : b : c; `clock`: may be a time of the day."""

    nodes: tuple[Node, ...]
    clock: bool
    sort: ClassVar[str] = "ratio"


@dataclasses.dataclass(frozen=True)
class Numeral(Answer):
    """Digits in a base other than ten; `key` is (digits, base)."""

    key: tuple[str, int]
    sort: ClassVar[str] = "base-n numeral"


@dataclasses.dataclass(frozen=True)
class Matrix(Answer):
    """Rows of cells; `kind` tells determinants from matrices."""

    kind: str
    rows: tuple[tuple[Answer, ...], ...]
    sort: ClassVar[str] = "matrix"


@dataclasses.dataclass(frozen=True)
class Choice(Answer):
    """The letter of an option, with its text or without."""

    letter: str
    value: Answer | None
    sort: ClassVar[str] = "letter"


@dataclasses.dataclass(frozen=True)
class Text(Answer):
    """Words; compared as words."""

    words: tuple[str, ...]
    sort: ClassVar[str] = "text"
