r"""Verdicts without a grading process: equal spelling, and plain numbers.

Most responses are decided here, ten thousand a second. Pure functions, standard library only, linear in the
length of a text. Whatever is neither the same spelling nor two numbers is left to `process`.
"""

import functools
import re
from fractions import Fraction

from .unicode import to_latex

# No gold answer is nearly as long; a longer answer is compared character by character.
MAX_ANSWER = 4096

_SPACING = re.compile(r"(\\\\)|\\[!,;: ]|\\q?quad(?![a-zA-Z])|~")
_SIZING = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_LISTED = re.compile(r"(?<=[0-9]), +(?=[0-9]{3}(?![0-9]))")  # a list, where 1,234 is a number
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}\\]*)\}")


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    r"""One spelling for answers that differ in typesetting only: space, `\dfrac`, `\left`, `$`, full stop."""
    if text.isascii() and text.isalnum():
        return text
    text = to_latex(text).removesuffix(".")
    if "," in text:
        text = _LISTED.sub(";", re.sub(r",\\!\s*", ",", text)).replace("{,}", ",")
    text = _SIZING.sub("", _SPACING.sub(lambda m: m[1] or " ", text))
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = _LOOSE_SPACE.sub("", " ".join(text.split()))
    text = text.removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    text = text.removeprefix("\\$").strip("$").removesuffix(".")
    whole = _WRAPPER.fullmatch(text)
    return whole[1].strip() if whole else text


_INTEGER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]{1,400})"
_DECIMAL = re.compile(rf"(?:{_INTEGER}(?:\.[0-9]{{0,400}})?|[-+]?\.[0-9]{{1,400}})(?:[eE][-+]?[0-9]{{1,3}})?")
_QUOTIENT = re.compile(
    rf"(?P<sign>[-+]?)\\frac(?:\{{(?P<a>{_INTEGER})\}}\{{(?P<b>{_INTEGER})\}}|(?P<c>[0-9])(?P<d>[0-9]))"
    rf"|(?P<e>{_INTEGER})/(?P<f>[0-9]{{1,400}})"
)


@functools.lru_cache(maxsize=4096)
def plain_number(text: str) -> tuple[Fraction, bool] | None:
    r"""(exact value, written as a decimal?) of 7,425,000, .4, 1e3, 3/4 or \frac{3}{4}, spelt canonically."""
    if _DECIMAL.fullmatch(text):
        written = text.replace(",", "").replace(" ", "")
        return Fraction(written), "." in written or "e" in written.lower()
    quotient = _QUOTIENT.fullmatch(text)
    if quotient is None or (quotient["e"] and " " in quotient["e"]):  # 2 125/3 may be a mixed number
        return None
    above = quotient["a"] or quotient["c"] or quotient["e"]
    below = quotient["b"] or quotient["d"] or quotient["f"]
    above, below = (int(part.replace(",", "").replace(" ", "")) for part in (above, below))
    if below == 0:
        return None
    return Fraction(above, below) * (-1 if quotient["sign"] == "-" else 1), False


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Whether `answer` is `gold`, or None where reading alone does not decide.

    Answers of one canonical spelling are equal. Two plain numbers are compared exactly; a decimal may be
    rounded, see `close_decimals`.
    """
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer.strip() == gold.strip()
    answer, gold = canonical(answer), canonical(gold)
    if not answer or answer == gold:
        return bool(answer)
    mine, theirs = plain_number(answer), plain_number(gold)
    if mine is None or theirs is None:
        return None
    (a, a_decimal), (g, g_decimal) = mine, theirs
    return close_decimals(a, g) if a_decimal or g_decimal else a == g


def close_decimals(a: Fraction, g: Fraction) -> bool:
    """Whether a decimal equals a gold: exactly where one is whole, else to six places and five digits.

    Six places are math-verify's precision; alone they would make all small numbers equal.
    """
    if a == g or g.denominator == 1 or a.denominator == 1:
        return a == g
    return round(a, 6) == round(g, 6) and abs(a - g) <= Fraction(1, 10**5) * abs(g)
