"""Unicode mathematics as LaTeX: full-width digits, ½, x², √2, π, ≤ and their like.

Owns characters alone; `tokens` reads the LaTeX. Pure.
"""

import re
import unicodedata

from .tables import UNICODE

_LOWERED = re.compile("[₀-₉₊₋₍₎]+")
_SCRIPTS = re.compile(f"[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿⁱ]+|{_LOWERED.pattern}")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_ROOT = re.compile(r"([√∛∜])\s*(?:([0-9]+|[^\W\d_])|\(([^()]*)\)|\{([^{}]*)\})")
_ROOT_NAMES = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}


def to_latex(text: str) -> str:
    """Unicode mathematics as LaTeX: full-width digits, ½, x², √2, π, ≤ and their like; the rest by NFKC."""

    def fraction(match: re.Match[str]) -> str:
        above, below = unicodedata.normalize("NFKC", match[0]).split("⁄")
        return f"\\frac{{{above}}}{{{below}}}"

    def script(match: re.Match[str]) -> str:
        lowered = _LOWERED.match(match[0])
        return f"{'_' if lowered else '^'}{{{unicodedata.normalize('NFKC', match[0])}}}"

    def root(match: re.Match[str]) -> str:
        return f"{_ROOT_NAMES[match[1]]}{{{match[2] or match[3] or match[4] or ''}}}"

    if text.isascii():
        return text.strip()
    text = _ROOT.sub(root, _SCRIPTS.sub(script, _VULGAR.sub(fraction, text)))
    return unicodedata.normalize("NFKC", text).translate(UNICODE).strip()
