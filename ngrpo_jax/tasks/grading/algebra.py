"""Whether two expressions are equal: by their values, exact where these are rational, else to many digits.

Variables get rational values, the same in both expressions; a polynomial identity that holds at five random
points holds. Values that are not rational are computed with more and more digits: the difference of equal
ones shrinks along, that of different ones stays. So 1/2004! differs from 1/2006!, and e^(pi sqrt 163) from
the integer that it nearly is; math-verify rounds to six places.

Runs in the grading process, under its deadline: values can take long. Must not know answers.
"""

from collections.abc import Sequence
from fractions import Fraction

import mpmath

from .expressions import Node, has, is_decimal, letters
from .plain import close_decimals
from .values import Number, UndefinedError, divide, to_float, try_value, value_at

_DIGITS = (30, 100, 250)
_POINTS = 5


def equal(a: Node, g: Node) -> bool:
    """Whether an expression `a` equals the gold `g` for all values of their variables.

    Without variables, a decimal may be rounded where the gold is no whole number, see `plain.close_decimals`.
    """
    if a == g:
        return not has(a, "undefined")
    if has(a, "constant") or has(g, "constant"):
        infinite = [_infinite(node) for node in (a, g)]
        if any(infinite):
            return infinite[0] == infinite[1] != 0
    names = sorted(letters(a) | letters(g))
    if not names and (is_decimal(a) or is_decimal(g)):
        return _equal_decimals(a, g)
    agreements = 0
    for point in _points(names):
        agreement = _agree(a, g, point)
        if agreement is False:
            return False
        agreements += agreement is True
    return agreements >= 1


def proportional(a: Node, g: Node) -> int:
    """The sign of the constant c with a = c g for all values of the variables; 0 where there is none."""
    names = sorted(letters(a) | letters(g))
    quotients = []
    for point in _points(names or ["x"]):
        values = [value_at(node, point, _DIGITS[1]) for node in (a, g)]
        if any(isinstance(value, mpmath.mpc) for value in values) or values[0] == 0 or values[1] == 0:
            return 0
        quotients.append(divide(values[0], values[1]))
    first = quotients[0]
    if any(abs(quotient - first) > abs(first) * Fraction(1, 10**60) for quotient in quotients):
        return 0
    return 1 if first > 0 else -1


def real_value(node: Node) -> Number | None:
    """The value of an expression without variables, infinity included; None where it is no real number."""
    infinite = _infinite(node)
    if infinite:
        return mpmath.mpf("inf") * infinite
    if letters(node):
        return None
    try:
        value = value_at(node, {}, _DIGITS[0])
    except UndefinedError:
        return None
    return None if isinstance(value, mpmath.mpc) else to_float(value)


def is_whole(node: Node) -> bool:
    """Whether an expression is a whole number, for all values of its variables."""
    values = [try_value(node, point, _DIGITS[0]) for point in _points(sorted(letters(node)))]
    return all(isinstance(value, Fraction) and value.denominator == 1 for value in values)


def _points(names: Sequence[str]) -> list[dict[str, Fraction]]:
    """Values of the variables: first positive ones, then some negative. One point where there are none."""
    if not names:
        return [{}]
    points = []
    for k in range(_POINTS):
        signs = [-1 if k >= 3 and (i + k) % 2 else 1 for i in range(len(names))]
        points.append(
            {name: signs[i] * Fraction(17 + 12 * i + 7 * k, 13 + 2 * k) for i, name in enumerate(names)}
        )
    return points


def _agree(a: Node, g: Node, point: dict[str, Fraction]) -> bool | None:
    """Whether two values are equal at a point; None where only one is real, or one has no value."""
    difference = None
    for digits in _DIGITS:
        values = [try_value(node, point, digits) for node in (a, g)]
        if values[0] is None or values[1] is None:
            return False if not point else None
        if point and len({isinstance(value, mpmath.mpc) for value in values}) == 2:
            # Outside of the domain of one: of \ln x^2 and 2 \ln x no matter, of \ln |x| and \ln x it is.
            return False if has(a, "absolute") != has(g, "absolute") else None
        if all(isinstance(value, Fraction) for value in values):
            return bool(values[0] == values[1])
        with mpmath.workdps(digits):
            x, y = (to_float(value) for value in values)
            size, earlier, difference = max(abs(x), abs(y)), difference, abs(x - y)
            if difference == 0:
                continue
            if size > mpmath.mpf(10) ** -15 and difference > size * mpmath.mpf(10) ** -15:
                return False
            if (
                earlier is not None
                and difference > earlier * mpmath.mpf(10) ** -50
                and (difference > size * mpmath.mpf(10) ** -80)
            ):
                return False
    return True


def _equal_decimals(a: Node, g: Node) -> bool:
    x, y = (try_value(node, {}, _DIGITS[0]) for node in (a, g))
    if x is None or y is None or isinstance(x, mpmath.mpc) or isinstance(y, mpmath.mpc):
        return False
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return close_decimals(x, y)
    with mpmath.workdps(_DIGITS[0]):
        x, y = to_float(x), to_float(y)
        if mpmath.isint(y):
            return bool(abs(x - y) <= mpmath.mpf(10) ** -20 * abs(y))
        places = mpmath.mpf(10) ** 6
        return bool(mpmath.nint(x * places) == mpmath.nint(y * places) and abs(x - y) <= abs(y) / 10**5)


def _infinite(node: Node) -> int:
    """1 for infinity, -1 for minus infinity, 0 for anything else."""
    if node[0] == "minus":
        return -_infinite(node[1])
    return int(node == ("constant", "infinity"))
