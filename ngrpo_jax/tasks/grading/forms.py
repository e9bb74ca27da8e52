r"""Tokens, and sequences of them: splitting at symbols outside of brackets, trimming, spelling.

Must not know what an answer means. Pure.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class UnreadableError(Exception):
    """Text that the reading does not cover."""


class Token(NamedTuple):
    """One token, see `tokens`; `parts` are those of a group, or a matrix's rows; `spaced` = after a space."""

    kind: str
    text: str = ""
    parts: tuple = ()
    spaced: bool = False

    def is_symbol(self, *names: str) -> bool:
        """Whether this is one of these symbols."""
        return self.kind == "symbol" and self.text in names

    def is_command(self, *names: str) -> bool:
        """Whether this is one of these commands."""
        return self.kind == "command" and self.text in names

    def is_word(self, *words: str) -> bool:
        """Whether this is one of these words, in any case and type."""
        return self.kind in ("text", "word") and self.text.lower() in words


Tokens = tuple[Token, ...]

_OPEN, _CLOSE = ("(", "[", "{", "lfloor", "lceil"), (")", "]", "}", "rfloor", "rceil")
_EDGES = (",", ";", ".", "\\\\", "?", "&", ":")


def group(*tokens: Token) -> Token:
    """These tokens in braces; braces around a single group are left out."""
    return tokens[0] if len(tokens) == 1 and tokens[0].kind == "group" else Token("group", parts=tokens)


def anywhere(tokens: Sequence[Token], test: Callable[[Token], bool]) -> bool:
    """Whether a token passes a test, also within groups."""
    return any(test(t) or (t.kind == "group" and anywhere(t.parts, test)) for t in tokens)


def bracket_level(token: Token) -> int:
    """1 for an opening bracket, -1 for a closing one, else 0."""
    return token.is_symbol(*_OPEN) - token.is_symbol(*_CLOSE)


def split(tokens: Sequence[Token], *symbols: str) -> list[list[Token]]:
    """The parts of `tokens` between these symbols, outside of all brackets."""
    parts: list[list[Token]] = [[]]
    level = 0
    for token in tokens:
        level += bracket_level(token)
        if level == 0 and token.is_symbol(*symbols):
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def enclosed(tokens: Sequence[Token]) -> str:
    """The two brackets around the whole of `tokens`, such as "()" or "[)"; "" without."""
    if len(tokens) < 2 or not tokens[0].is_symbol(*_OPEN) or not tokens[-1].is_symbol(*_CLOSE):
        return ""
    level = 0
    for i, token in enumerate(tokens):
        level += bracket_level(token)
        if level == 0 and i < len(tokens) - 1:
            return ""
    return tokens[0].text + tokens[-1].text if level == 0 else ""


def trim(tokens: Sequence[Token]) -> Tokens:
    """The tokens without punctuation and row breaks around them, and without braces."""
    tokens = tuple(tokens)
    while tokens:
        if tokens[-1].is_symbol(*_EDGES):
            tokens = tokens[:-1]
        elif tokens[0].is_symbol("&", "\\\\"):
            tokens = tokens[1:]
        elif len(tokens) == 1 and tokens[0].kind == "group":
            tokens = tokens[0].parts
        else:
            break
    return tokens


_SPELLINGS = {"*": "\\cdot", "deg": "^\\circ", "{": "\\{", "}": "\\}", "||": "\\|", "%": "\\%", "$": "\\$"}


def spell(tokens: Sequence[Token]) -> str:
    """One spelling in LaTeX for each normal form."""
    return " ".join(map(_spell, tokens))


def _spell(token: Token) -> str:
    if token.kind == "matrix":
        rows = (" & ".join(spell(cell) for cell in row) for row in token.parts)
        return f"\\begin{{{token.text}}}" + " \\\\ ".join(rows) + f"\\end{{{token.text}}}"
    if token.kind in ("group", "index"):
        return ("{%s}" if token.kind == "group" else "[%s]") % spell(token.parts)
    if token.kind == "text":
        return f"\\text{{{token.text}}}"
    named = token.kind == "command" or (token.kind in ("symbol", "letter") and len(token.text) > 1)
    spelt = f"\\{token.text}" if named else token.text
    return _SPELLINGS.get(token.text, spelt) if token.kind == "symbol" else spelt
