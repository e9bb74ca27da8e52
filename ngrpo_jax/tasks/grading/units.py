r"""Units, currencies and counted things: cm, \text{ cm}^2, miles per hour, \$, people.

A single letter is a unit in upright type alone; known words of two letters and more also in italics. Must not
know values. Pure.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

from . import tables
from .forms import Token

_CURRENCIES = ("$", "€", "£", "¥", "₹", "¢")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
_LARGEST_POWER = 6


@dataclasses.dataclass(frozen=True)
class Unit:
    """size * dimension^power * ...; `powers` are sorted, a counted thing is a dimension of its own name."""

    powers: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)

    def times(self, other: "Unit", power: int = 1) -> "Unit":
        """This unit times another to a power."""
        powers = dict(self.powers)
        for name, exponent in other.powers:
            powers[name] = powers.get(name, 0) + exponent * power
        kept = tuple(sorted((name, exponent) for name, exponent in powers.items() if exponent))
        return Unit(kept, self.size * other.size**power)


_ONE = Unit()
_UNITS = {
    name: Unit(((dimension, int(power)),), Fraction(size))
    for dimension, power, size, *names in map(str.split, tables.UNITS.strip().split("\n"))
    for name in names
}
PERCENT, DEGREE = _UNITS["%"], _UNITS["deg"]


def _unit_of_word(word: str) -> Unit | None:
    lowered = word.lower()
    for name in (word, lowered, lowered.removesuffix("s"), lowered.removesuffix("es")):
        if name in _UNITS and (len(name) > 1 or name == word):
            return _UNITS[name]
    return None


def is_word(token: Token) -> bool:
    """Whether letters in italics are a word: 5 cm, 100 miles, 100 people, but 4mn and 2ab are products."""
    word = token.text
    if token.kind != "word" or word in tables.ITALIC_PAIRS:
        return token.kind == "word"
    known = word.lower() in tables.ABBREVIATIONS or (len(word) > 2 and _unit_of_word(word) is not None)
    return known or (len(word) > 3 and token.spaced)


def split_currency(tokens: Sequence[Token]) -> tuple[Unit | None, Sequence[Token]]:
    r"""The currency before a value, \$18 or -\$18, and the value."""
    i = 1 if tokens and tokens[0].is_symbol("-", "+") else 0
    if len(tokens) > i + 1 and tokens[i].is_symbol(*_CURRENCIES):
        return _UNITS[tokens[i].text], [*tokens[:i], *tokens[i + 1 :]]
    return None, tokens


def find_unit(tokens: Sequence[Token], variables: frozenset[str]) -> tuple[int, Unit] | None:
    """Where the unit begins that ends `tokens`, and the unit; None where there is none.

    A word whose letters the other side has as `variables` is no unit but a product. Degrees alone are left to
    the expression, in which they may stand within a function.
    """
    for i, token in enumerate(tokens):
        after = tokens[i + 1] if i + 1 < len(tokens) else token
        celsius = token.is_symbol("deg") and (after.kind == "text" or after.text in ("C", "F"))
        word = token.kind == "text" and token.text.lower() not in tables.NUMBER_WORDS
        word = (word or is_word(token)) and not variables.issuperset(token.text)
        fraction = token.is_command("frac") and all(read_unit(t.parts) for t in tokens[i + 1 : i + 3])
        if i > 0 and (celsius or word or fraction or token.is_symbol("%", *_CURRENCIES)):
            unit = read_unit(tokens[i:])
            return None if unit is None else (i, unit)
    return None


def read_unit(tokens: Sequence[Token]) -> Unit | None:
    """The unit that is the whole of `tokens`; None where they are no unit."""
    unit, last = _ONE, None  # `last` is the last factor, which a power may follow
    sign = coming = 1  # -1 after "per" or a slash; 2 after "square"
    stack = list(tokens)[::-1]
    while stack:
        token = stack.pop()
        word = token.text.rstrip(".").lower() if token.kind in ("text", "word") else ""
        if token.is_command("frac"):
            above, below = stack.pop(), stack.pop()
            stack += [below, Token("symbol", "/"), above]
        elif word in tables.ABBREVIATIONS:
            stack += [Token("text", part) for part in reversed(tables.ABBREVIATIONS[word].split())]
        elif token.is_symbol("/") or word == "per":
            sign = -1
        elif word in _POWERS:
            coming = _POWERS[word]
        elif token.is_symbol("^") or word in _POWERS_AFTER:
            power = _POWERS_AFTER.get(word) or _integer(stack.pop())
            if power is None or last is None or abs(power) > _LARGEST_POWER:
                return None
            unit, last = unit.times(last, power - 1), None
        elif not token.is_symbol("*", "."):
            if unit == DEGREE and token.text in ("C", "F", "Celsius", "Fahrenheit"):
                unit = _ONE
            elif token.kind == "letter":
                return None
            factor = _factor(token, word)
            if factor is None:
                return None
            last = _ONE.times(factor, sign)
            unit = unit.times(factor, sign * coming)
            sign = coming = 1
    return unit


def _factor(token: Token, word: str) -> Unit | None:
    """The unit of one token."""
    if token.is_symbol("%", "deg", *_CURRENCIES):
        return _UNITS[token.text]
    if token.kind == "group":
        return read_unit(token.parts)
    thing = word.removesuffix("s")
    if tables.NO_UNIT & {word, thing}:
        return None
    known = _unit_of_word(token.text.rstrip("."))
    if known is not None or not word:
        return known
    if token.kind == "text" and len(word) == 1 and word != "a":
        return None
    return _ONE if thing in tables.FILLERS else Unit(((f"'{thing}", 1),))


def _integer(token: Token) -> int | None:
    text = "".join(part.text for part in token.parts)
    return int(text) if text.removeprefix("-").isdigit() else None
