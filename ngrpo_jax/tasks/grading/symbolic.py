"""math-verify for what `expressions` does not read: sums, products, integrals, limits.

Runs in the grading process. Its numerical comparison rounds to six places, and is guarded here.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from .forms import Token, anywhere, spell

# What the grammar leaves out on purpose. Anything else that is not read is not equal, rather than guessed at.
_READ = frozenset({"sum", "prod", "int", "iint", "oint", "lim", "gcd", "lcm", "max", "min"})

_RELATIONS = ("=", "<", ">", "le", "ge", "ne", "in", "approx", "equiv")

Symbolic = Callable[[Sequence[Token], Sequence[Token]], bool]


def load() -> Symbolic:
    """math-verify as a function that says whether two token sequences are equal; imports it."""
    from math_verify import LatexExtractionConfig, grader, parse, verify

    logging.disable(logging.CRITICAL)
    grader.sympy_numeric_eq = _guarded(grader.sympy_numeric_eq)
    targets = [LatexExtractionConfig(boxed_match_priority=0)]

    def equal(answer: Sequence[Token], gold: Sequence[Token]) -> bool:
        if not (is_covered(answer) or is_covered(gold)):
            return False
        parsed = [
            parse(f"\\boxed{{{spell(tokens)}}}", targets, parsing_timeout=None) for tokens in (gold, answer)
        ]
        return bool(verify(*parsed, timeout_seconds=None))

    return equal


def is_covered(tokens: Sequence[Token]) -> bool:
    """Whether unread tokens are mathematics for math-verify, which takes one side of relations for all."""
    other = any(t.kind == "text" or t.is_symbol(*_RELATIONS) for t in tokens)
    return not other and anywhere(tokens, lambda token: token.is_command(*_READ))


def _guarded(numeric_eq: Callable[..., bool]) -> Callable[..., bool]:
    """math-verify's numeric comparison, but not blind to small numbers.

    It rounds or chops differences to an absolute precision, so that 1/2^99 equals 1/2^98 to it. Here the
    numbers must also be close in relation to their size; symbols stand for themselves by arbitrary values.
    """
    from sympy import Expr, Float, N, Rational

    def far_apart(a: Any, b: Any) -> bool:
        if not isinstance(a, Expr) or not isinstance(b, Expr):
            return False
        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        values = {symbol: Rational(17 + 6 * i, 13) for i, symbol in enumerate(symbols)}
        tolerance = 1e-5 if a.has(Float) or b.has(Float) else 1e-12
        a, b = N(a.subs(values), 30), N(b.subs(values), 30)
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            return False
        return bool(abs(a - b) > tolerance * max(abs(a), abs(b)))

    def guarded(a: Any, b: Any, *precision: int) -> bool:
        return numeric_eq(a, b, *precision) and not far_apart(a, b)

    return guarded
