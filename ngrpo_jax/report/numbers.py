"""Numbers as a page shows them: with their unit, without exponents, a narrow space between thousands."""

import math
from typing import Any

from ngrpo_jax.runtime.console import format_bytes, format_seconds

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DIGITS = 5  # that a curve keeps


def number(value: Any) -> str:
    """A value at a readable precision: whole numbers and large ones in full, others to four digits."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10_000 or float(value).is_integer():
        return f"{round(value):,}".replace(",", "\u202f").replace("-", "\u2212")
    if abs(value) >= 1e-3:
        return f"{value:.4g}".replace("-", "\u2212")
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "\u2212")


def quantity(value: float | None, unit: str) -> str:
    """A value with its unit, "%", "s", "bytes" or none of these."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "%":
        return percent(value)
    shown = {"s": format_seconds, "bytes": format_bytes}.get(unit, number)
    return shown(value)


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %".replace("-", "\u2212")


def points(change: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    text = f"{100 * change:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\u2212")


def short(value: float | None) -> float | None:
    """A value with the digits that a curve keeps; None where it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded
