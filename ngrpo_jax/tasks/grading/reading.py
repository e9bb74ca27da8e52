"""Tokens to an answer of a sort.

Owns how an answer is read; docs/grading.md has the reasons. Of the other side it knows only the letters that
are variables there. Must not compare. Pure.
"""

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

from . import units
from .expressions import Node, has, is_decimal, letters, parse
from .forms import Token, Tokens, UnreadableError, bracket_level, enclosed, spell, split, trim
from .intervals import FLIPPED, as_region, inequality, reals_without
from .names import name_of
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
from .symbolic import is_covered
from .words import has_sign, has_text, is_prose, with_sign, without_minutes, words_of


def read(tokens: Tokens, variables: frozenset[str] = frozenset()) -> Answer:
    """The answer that `tokens` are; letters in `variables` are never units."""
    return _Reader(variables).answer(tokens)


def variables_of(tokens: Sequence[Token]) -> frozenset[str]:
    """The letters that stand for variables: those in italics that are part of no unit or word."""
    found: set[str] = set()
    for token in tokens:
        if token.kind == "letter" and len(token.text) == 1:
            found.add(token.text)
        elif token.kind == "word" and not units.is_word(token):
            found.update(token.text)
        elif token.kind == "group":
            found |= variables_of(token.parts)
    return frozenset(found)


_CONNECTIVES = ("or", "and")
_RELATIONS = ("=", "<", ">", "le", "ge", "ne", "in", "approx", "equiv")
_DATE = re.compile(r"[0-9]{4} - [0-9]{2} - [0-9]{2}")
_NONE = (Token("end"), ())
_REALS = {"\\mathbbR", "all real numbers", "all reals", "real numbers", "all real number"}


class _Reader:
    """Reads one answer; each method takes the tokens of what it reads."""

    def __init__(self, variables: frozenset[str]):
        self._variables = variables

    def answer(self, tokens: Sequence[Token]) -> Answer:
        """A whole answer: one item, or several joined by commas, "or" and "and"."""
        tokens = trim(tokens)
        choice = self._choice(tokens)
        if choice is not None:
            return choice
        marked = [
            t._replace(kind="symbol") if t.kind != "symbol" and t.text.lower() in _CONNECTIVES else t
            for t in tokens
        ]
        parts = [part for part in map(trim, split(marked, ",", ";", *_CONNECTIVES, "\\\\")) if part]
        items = tuple(itertools.chain.from_iterable(map(self._item, parts)))
        if len(items) == 1:
            return items[0]
        both = any(t.is_symbol("and", "ne") for t in marked)  # x > 0, x ne 1: both
        return Collection(tokens, items, conjunction=both)

    def _item(self, tokens: Tokens) -> list[Answer]:
        """One item, or two where it has a plus-minus sign."""
        if has_sign(tokens):
            return [self._related(with_sign(tokens, upper)) for upper in (True, False)]
        return [self._related(tokens)]

    def _choice(self, tokens: Tokens) -> Choice | None:
        """(B) 12, B. 12 and (B): the letter of an option in brackets or as text before something."""
        bracketed = len(tokens) >= 3 and tokens[0].is_symbol("(") and tokens[2].is_symbol(")")
        letter, rest = (tokens[1], tokens[3:]) if bracketed else (tokens[0], tokens[1:]) if tokens else _NONE
        upright = letter.kind == "text"
        if not re.fullmatch("[A-J]", letter.text) or not (bracketed or rest):
            return None
        if rest and rest[0].is_symbol(".", ")", ":") and (bracketed or upright or rest[0].text != ":"):
            rest = rest[1:]
        elif not upright and not (bracketed and (not rest or rest[0].spaced or rest[0].kind == "text")):
            return None
        if rest and (rest[0].is_symbol(*_RELATIONS, *"+-*/^,;") or rest[0].text.lower() in _CONNECTIVES):
            return None
        return Choice(tokens, letter.text, self.answer(rest) if trim(rest) else None)

    def _related(self, tokens: Tokens) -> Answer:
        """An item with its relations: a value, a named value, an equation, an interval."""
        last = split(tokens, "implies")[-1]
        tokens = trim(last)
        levels = itertools.accumulate(map(bracket_level, tokens))
        relations = [
            t.text for t, level in zip(tokens, levels, strict=True) if not level and t.is_symbol(*_RELATIONS)
        ]
        if not relations:
            return self.value(tokens)
        parts = [trim(part) for part in split(tokens, *_RELATIONS)]
        try:
            if not all(parts):
                raise UnreadableError("one side of a relation is missing")
            if relations == ["in"]:
                return self._member(tokens, parts)
            if relations == ["equiv"]:
                return _congruence(tokens, parts)
            if set(relations) <= {"=", "approx"}:
                return self._equation(tokens, parts, relations)
            if set(relations) <= FLIPPED.keys():
                return inequality(tokens, parts, relations)
        except UnreadableError:
            pass
        return Text(tokens, words_of(tokens)) if has_text(tokens) else Answer(tokens)

    def _member(self, tokens: Tokens, parts: list[Tokens]) -> Answer:
        name = name_of(parts[0])
        if name is None:
            raise UnreadableError("a member without a name")
        return Named(tokens, name, self.answer(parts[1]))

    def _equation(self, tokens: Tokens, parts: list[Tokens], relations: list[str]) -> Answer:
        """x = 5, x = 2 + 3 = 5, 2 + 3 = 5, 2x + 3y = 6: by which sides are names and which have variables."""
        names = [name_of(part) for part in parts]
        if names[0] is None and names[-1] is not None and len(parts) == 2 and relations == ["="]:
            parts, names = parts[::-1], names[::-1]
        start = 1 if names[0] is not None else 0
        while start < len(parts) - 1 and names[start] is not None and relations[start - 1] == "=":
            start += 1
        values = [self.answer(part) for part in parts[start:]]
        about = [False, *(relation == "approx" for relation in relations[start:])]
        value = values[0] if len(values) == 1 else Chain(tokens, tuple(values), tuple(about))
        name = names[start - 1] if start else None
        if name is not None:
            decimal = isinstance(values[0], Scalar) and is_decimal(values[0].node)
            if relations[start - 1] == "approx" and not decimal:
                raise UnreadableError("about a whole number")
            return Named(tokens, name, value)
        constant = all(isinstance(v, Scalar) and not letters(v.node) for v in values)
        # Of a sum or an integral math-verify says whether it equals the other side.
        integral = any(type(v) is Answer and is_covered(v.tokens) for v in values)
        if constant or integral or "approx" in relations:
            return value
        if len(parts) == 2:
            return Relation(tokens, "=", parse(parts[0]), parse(parts[1]))
        raise UnreadableError("a chain of equations")

    def value(self, tokens: Tokens) -> Answer:
        """An item without relations."""
        for reading in (self._set, self._union, self._without, self._brackets, self._numeral, self._ratio):
            found = reading(tokens)
            if found is not None:
                return found
        matrix = tokens[1:-1] if enclosed(tokens) in ("()", "[]") else tokens
        if len(matrix) == 1 and matrix[0].kind == "matrix":
            rows = (tuple(self.value(c) if c else Answer(()) for c in row) for row in matrix[0].parts)
            return Matrix(tokens, matrix[0].text, tuple(rows))
        words = words_of(tokens)
        if " ".join(words) in _REALS:
            return reals_without(tokens)
        if is_prose(tokens) or _DATE.fullmatch(spell(tokens)):
            return Text(tokens, words)
        return self._scalar(tokens) or (Text(tokens, words) if has_text(tokens) else Answer(tokens))

    def _set(self, tokens: Tokens) -> Answer | None:
        if len(tokens) == 1 and tokens[0].is_command("emptyset"):
            return Collection(tokens, (), braces=True)
        if enclosed(tokens) != "{}":
            return None
        inner = trim(tokens[1:-1])
        for mark in (":", "|"):
            head, *conditions = split(inner, mark)
            rest = [t for part in conditions for t in (*part, Token("symbol", "|"))][:-1]
            if conditions and name_of(split(head, "in")[0]) is not None:
                return self._builder(tokens, rest)
            if head and len(conditions) == 1:
                return Ordered(tokens, "{|}", (self.answer(head), self.answer(rest)))
        if not inner:
            return Collection(tokens, (), braces=True)
        found = self.answer(inner)
        items = found.items if isinstance(found, Collection) and not found.braces else (found,)
        return Collection(tokens, items, braces=True)

    def _builder(self, tokens: Tokens, conditions: Sequence[Token]) -> Answer:
        r"""{x | 0 < x < 3}: the region of its conditions."""
        found = self.answer(conditions)
        if isinstance(found, Region):
            return Region(tokens, found.pieces)
        if isinstance(found, Collection):
            return Collection(tokens, found.items, conjunction=True)
        return found.value if isinstance(found, Named) else Answer(tokens)

    def _union(self, tokens: Tokens) -> Answer | None:
        parts = list(map(trim, split(tokens, "cup")))
        if len(parts) == 1 or not all(parts):
            return None
        items = list(map(self.value, parts))
        if all(isinstance(item, Collection) and item.braces for item in items):
            sets = (item.items for item in items if isinstance(item, Collection))
            return Collection(tokens, tuple(itertools.chain.from_iterable(sets)), braces=True)
        regions = [region for region in map(as_region, items) if region is not None]
        pieces = tuple(itertools.chain.from_iterable(region.pieces for region in regions))
        return Region(tokens, pieces) if len(regions) == len(items) else Answer(tokens)

    def _without(self, tokens: Tokens) -> Answer | None:
        r"""\mathbb{R} \setminus \{2\}: what is in one set and not among some numbers."""
        whole, *left_out = map(trim, split(tokens, "setminus", "-"))
        if not whole or len(left_out) != 1 or enclosed(left_out[0]) != "{}":
            return None
        region, points = (as_region(self.value(part)) for part in (whole, left_out[0]))
        if region is None or points is None:
            return None
        others = reals_without(tokens, [piece.low for piece in points.pieces])
        return Collection(tokens, (region, others), conjunction=True)

    def _brackets(self, tokens: Tokens) -> Answer | None:
        brackets = enclosed(tokens)
        if brackets not in ("()", "[]", "(]", "[)"):
            return None
        parts = [trim(part) for part in split(tokens[1:-1], ",", ";")]
        if len(parts) == 1:
            whole = brackets == "()" and any(t.is_symbol(*_RELATIONS, *_CONNECTIVES, ":") for t in parts[0])
            return self.answer(parts[0]) if whole else None
        return Ordered(tokens, brackets, tuple(map(self._related, parts))) if all(parts) else Answer(tokens)

    def _numeral(self, tokens: Tokens) -> Answer | None:
        """52_8, (204)_5, 2A_{16}, 1011 base 2."""
        if len(tokens) < 3 or not (tokens[-2].is_symbol("_") or tokens[-2].is_word("base")):
            return None
        body, base = tokens[:-2], tokens[-1].parts or tokens[-1:]
        bracketed = enclosed(body) == "()"
        digits = "".join(token.text for token in (body[1:-1] if bracketed else body))
        written = "".join(token.text for token in base).removeprefix("(").removesuffix(")")
        pattern = "-?[0-9A-Za-z]+" if bracketed else "-?[0-9][0-9A-Za-z]*"
        if not re.fullmatch("[0-9]{1,2}", written) or not re.fullmatch(pattern, digits):
            return None
        if written == "10" and digits.isdigit():
            return Scalar(tokens, ("number", Fraction(digits), False))
        return Numeral(tokens, (digits.upper().lstrip("0"), int(written)))

    def _ratio(self, tokens: Tokens) -> Answer | None:
        parts = [trim(part) for part in split(tokens, ":")]
        if len(parts) == 1:
            return None
        try:
            nodes = tuple(parse(part) for part in parts)
        except UnreadableError:
            return Text(tokens, words_of(tokens))
        clock = all(re.fullmatch("[0-5]?[0-9]", part[0].text) and len(part) == 1 for part in parts)
        return Ratio(tokens, nodes, clock and all(len(part[0].text) == 2 for part in parts[1:]))

    def _scalar(self, tokens: Tokens) -> Scalar | None:
        currency, rest = units.split_currency(tokens)
        rest, angle = without_minutes(rest)
        found = units.find_unit(rest, self._variables)
        try:
            if found is not None:
                unit = found[1] if currency is None else currency
                return Scalar(tokens, parse(rest[: found[0]]), unit if unit.powers else None)
            node = parse(rest)
        except UnreadableError:
            return self._compound(tokens)
        if currency is None and (angle or has(_outside_functions(node), "degrees")):
            currency = units.DEGREE
        return Scalar(tokens, node, currency)

    def _compound(self, tokens: Tokens) -> Scalar | None:
        """3 hours 20 minutes: values of one dimension, the sum of them."""
        starts = [i for i, t in enumerate(tokens) if t.kind == "number"] + [len(tokens)]
        if len(starts) < 3 or starts[0] != 0:
            return None
        total, powers = Fraction(0), set()
        for start, end in itertools.pairwise(starts):
            unit = units.read_unit(tokens[start + 1 : end])
            if (
                unit is None
                or not unit.powers
                or any(name.startswith("'") for name, _ in unit.powers)
                or not tokens[start].text.isdigit()
            ):
                return None
            total += int(tokens[start].text) * unit.size
            powers.add(unit.powers)
        return (
            Scalar(tokens, ("number", total, False), units.Unit(powers.pop())) if len(powers) == 1 else None
        )


def _congruence(tokens: Tokens, parts: list[Tokens]) -> Relation:
    """x = 3 (mod 7), of its two sides; UnreadableError without a modulus."""
    right = parts[1]
    for i, token in enumerate(right):
        if token.is_command("pmod", "mod", "bmod"):
            residue = right[: i - 1] if i and right[i - 1].is_symbol("(") else right[:i]
            return Relation(tokens, "equiv", parse(parts[0]), parse(residue), parse(trim(right[i + 1 :])))
    raise UnreadableError("a congruence without its modulus")


def _outside_functions(node: Node) -> Node:
    """The node without the arguments of functions, in which degrees are radians."""
    if node[0] in ("function", "log"):
        return ("number", Fraction(1), False)
    return (node[0], *(_outside_functions(part) if isinstance(part, tuple) else part for part in node[1:]))
