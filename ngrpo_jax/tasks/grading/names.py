r"""Names of values: x, AB, \angle ABC, f(2), m + n, Area, (x, y), \cos A.

Owns which tokens name a value, so that the other side of an equals sign is that value. Pure.
"""

import re
from collections.abc import Sequence

from . import tables
from .forms import Token, enclosed, spell, split

# Of spellings, in which a space follows each token.
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\} "
_CALL = r"\([^()]*(?:\([^()]*\)[^()]*)*\) "
_MARKS = rf"(?:_ {_GROUP}|' )*(?:\^ \{{- 1\}} (?=\())?(?:{_CALL})?"
_ACCENT = (
    r"\\(?:overline|bar|vec|hat|tilde|overrightarrow|widehat|angle|measuredangle|triangle|square|max|min) "
)
_WORD = rf"(?:{_ACCENT}(?:{_GROUP})?|\\text\{{\S+\}} |[A-Z][A-Za-z]* |[a-z]{{4,}} ){_MARKS}"
_GREEK = "|".join((*tables.GREEK.values(), *tables.GREEK_VARIANTS))
_UNKNOWN = rf"(?:[a-z]|\\(?!pi )(?:{_GREEK})) {_MARKS}"
_NAME = re.compile(rf"(?:{_WORD})*(?:{_UNKNOWN})?(?:{_WORD})*")
# Bars around an unknown hide its sign; z is a complex number, whose modulus they name.
_MODULUS = re.compile(rf"\| (?:(?:{_WORD})+|z )\| ")
_ANGLE = re.compile(
    rf"\\(?:sin|cos|tan|cot|sec|csc) (?:[A-Z]|\\(?:{_GREEK})|\\angle [A-Z]+|\( (?:[A-Z]|\\theta) \)) "
)


def name_of(tokens: Sequence[Token]) -> str | None:
    r"""The name, if `tokens` name a value: x, AB, \angle ABC, f(2), m + n, Area, (x, y); else None.

    Numbers may stand in subscripts and arguments alone: 3x, x + 2 and xy are no names, but parts of an
    equation that is still to be solved. The cosine of an angle is a name, that of an unknown is not.
    """
    if enclosed(tokens) == "()":
        parts = [name_of(part) for part in split(tokens[1:-1], ",")]
        whole = parts[0] if len(parts) == 1 else "(" + ",".join(map(str, parts)) + ")"
        return None if None in parts else whole
    parts = [_single_name(part) for part in split(tokens, "+")]
    return None if None in parts else "+".join(sorted(map(str, parts)))


def _single_name(tokens: Sequence[Token]) -> str | None:
    if any(token.kind == "text" and token.text.lower() in tables.NO_UNIT for token in tokens):
        return None
    spelt = spell(tokens)
    named = any(pattern.fullmatch(f"{spelt} ") for pattern in (_NAME, _MODULUS, _ANGLE))
    return spelt if named and tokens else None
