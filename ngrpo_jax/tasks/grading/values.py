"""Values of expressions at a point: Fractions where they are rational and not too large, else mpf or mpc.

Owns evaluation, with the conventions of school: the odd root of a negative number is real, and a function
takes degrees as radians. Runs in the grading process, under its deadline. Must not know what is compared.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

from .expressions import Node, has

Number = Any  # Fraction, mpf or mpc

_EXACT_BITS = 2_000_000  # of a rational value; beyond it values are floating-point numbers
_LARGEST_EXPONENT = 10**9


class UndefinedError(Exception):
    """An expression without a finite value, or without any here."""


def try_value(node: Node, point: dict[str, Fraction], digits: int) -> Number | None:
    """`value_at`, or None where there is no value."""
    try:
        return value_at(node, point, digits)
    except UndefinedError:
        return None


def value_at(node: Node, point: dict[str, Fraction], digits: int) -> Number:
    """The value of an expression: a Fraction where it is rational and not too large, else mpf or mpc."""
    try:
        with mpmath.workdps(digits + 10):
            value = _Evaluation(point).value(node)
            if isinstance(value, mpmath.mpc) and value.imag == 0:
                value = value.real
            if not isinstance(value, Fraction) and not mpmath.isfinite(value):
                raise UndefinedError
            return value
    except (ZeroDivisionError, ValueError, OverflowError, TypeError, NotImplementedError) as error:
        raise UndefinedError from error


class _Evaluation:
    """Values of nodes at one point."""

    def __init__(self, point: dict[str, Fraction]):
        self._point = point

    def value(self, node: Node) -> Number:
        """The value of a node, at mpmath's present precision."""
        kind, *parts = node
        if kind == "number":
            return parts[0]
        if kind == "letter":
            return self._point[parts[0]]
        if kind == "constant":
            return _constant(parts[0])
        if kind == "function":
            return _function(parts[0], self._angle(parts[1]))
        if kind == "log":
            return self._log(*parts)
        operation = _OPERATIONS.get(kind)
        if operation is None:
            raise UndefinedError
        return operation(*(self.value(part) for part in parts))

    def _angle(self, node: Node) -> Number:
        """The value of a function's argument: degrees are radians there."""
        if not has(node, "degrees"):
            return self.value(node)
        return mpmath.radians(to_float(self.value(node)))

    def _log(self, base: Node | None, argument: Node) -> Number:
        # A logarithm without base is to the base 10 or e: it equals another for any base, or not at all.
        b = Fraction(37, 11) if base is None else self.value(base)
        value = self.value(argument)
        if value == 0:
            raise UndefinedError
        return _real(mpmath.log(to_float(value)) / mpmath.log(to_float(b)))


def _constant(name: str) -> Number:
    if name == "infinity":
        raise UndefinedError
    return {"pi": mpmath.pi, "e": mpmath.e, "i": mpmath.mpc(0, 1)}[name] * 1


def to_float(value: Number) -> Number:
    """A Fraction as an mpf; any other number as it is."""
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _real(value: Number) -> Number:
    """A complex number without imaginary part as a real one."""
    return value.real if isinstance(value, mpmath.mpc) and value.imag == 0 else value


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exactly(operation: Callable[[Any, Any], Any]) -> Callable[[Number, Number], Number]:
    """An operation on rationals as long as they are not too large, else on floating-point numbers."""

    def apply(x: Number, y: Number) -> Number:
        if isinstance(x, Fraction) and isinstance(y, Fraction) and _bits(x) + _bits(y) < _EXACT_BITS:
            return operation(x, y)
        return _real(operation(to_float(x), to_float(y)))

    return apply


def divide(x: Number, y: Number) -> Number:
    """The quotient; UndefinedError for one by zero."""
    if y == 0:
        raise UndefinedError
    return _exactly(lambda a, b: a / b)(x, y)


def _power(x: Number, y: Number) -> Number:
    if x == 0:
        if isinstance(y, mpmath.mpc) or y <= 0:
            raise UndefinedError
        return Fraction(0)
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if y.denominator == 1 and abs(y.numerator) * _bits(x) < _EXACT_BITS:
            return x ** int(y)
        if y.denominator % 2 and y.denominator > 1 and x < 0:  # the real root of a negative number
            sign = -1 if y.numerator % 2 else 1
            return sign * _power(-x, y)
    x, y = to_float(x), to_float(y)
    if abs(mpmath.log(abs(x)) * y) > _LARGEST_EXPONENT:
        raise UndefinedError
    return _real(mpmath.power(x, y))


def _root(n: Number, x: Number) -> Number:
    return _power(x, divide(Fraction(1), n))


def _factorial(x: Number) -> Number:
    if isinstance(x, Fraction) and x.denominator == 1:
        if x < 0:
            raise UndefinedError
        if x <= 5000:
            return Fraction(math.factorial(int(x)))
    if isinstance(x, mpmath.mpc) or abs(x) > 10**8:
        raise UndefinedError
    return mpmath.gamma(to_float(x) + 1)


def _binomial(n: Number, k: Number) -> Number:
    whole = isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1
    if whole and 0 <= k <= n <= 5000:
        return Fraction(math.comb(int(n), int(k)))
    return mpmath.binomial(to_float(n), to_float(k))


def _floor(x: Number) -> Number:
    """The whole number below; what is whole but for the last digits, as logarithms are, counts as whole."""
    if isinstance(x, mpmath.mpc):
        raise UndefinedError
    if isinstance(x, Fraction):
        return Fraction(math.floor(x))
    nearest = mpmath.nint(x)
    near = abs(x - nearest) < mpmath.mpf(10) ** -20
    return Fraction(int(nearest if near else mpmath.floor(x)))


_INVERSES = {"sec": "cos", "csc": "sin", "cot": "tan"}


def _function(name: str, x: Number) -> Number:
    x = to_float(x)
    if not isinstance(x, mpmath.mpc) and abs(x) > _LARGEST_EXPONENT and name not in ("arctan", "arccot"):
        raise UndefinedError
    if name in _INVERSES:
        return divide(Fraction(1), _function(_INVERSES[name], x))
    if name.startswith("arc"):
        return _inverse(name[3:], x)
    return _real(getattr(mpmath, name)(x))


def _inverse(name: str, x: Number) -> Number:
    """An inverse trigonometric function; that of the cotangent has values between 0 and pi."""
    if name == "cot":
        return mpmath.pi / 2 - mpmath.atan(x)
    if name in _INVERSES:
        x, name = 1 / x, _INVERSES[name]
    return _real(getattr(mpmath, f"a{name}")(x))


_OPERATIONS: dict[str, Callable[..., Number]] = {
    "sum": _exactly(lambda x, y: x + y),
    "product": _exactly(lambda x, y: x * y),
    "quotient": divide,
    "power": _power,
    "minus": lambda x: -x,
    "root": _root,
    "factorial": _factorial,
    "binomial": _binomial,
    "absolute": abs,
    "floor": _floor,
    "ceiling": lambda x: -_floor(-x),
    "degrees": lambda x: x,
}
