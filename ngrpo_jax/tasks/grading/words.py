"""Small readings of token sequences: words, signs that stand for two values, minutes of an angle. Pure."""

from collections.abc import Sequence
from fractions import Fraction

from .forms import Token, Tokens, anywhere, enclosed, spell


def has_sign(tokens: Sequence[Token]) -> bool:
    """Whether a plus-minus sign stands outside of a set."""
    return enclosed(tokens) != "{}" and anywhere(tokens, lambda token: token.is_symbol("pm", "mp"))


def with_sign(tokens: Sequence[Token], upper: bool) -> Tokens:
    """Plus for plus-minus and minus for minus-plus, or the other way round."""
    signs = {"pm": "+-"[not upper], "mp": "+-"[upper]}

    def change(token: Token) -> Token:
        if token.kind == "group":
            return token._replace(parts=with_sign(token.parts, upper))
        return token._replace(text=signs[token.text]) if token.is_symbol(*signs) else token

    return tuple(map(change, tokens))


def has_text(tokens: Sequence[Token]) -> bool:
    """Whether there are words; two letters in italics, such as dx, are none."""
    return anywhere(tokens, lambda token: token.kind == "text" or _is_long(token, 2))


def is_prose(tokens: Sequence[Token]) -> bool:
    """Whether words alone are there: text, or italics of which one is no product of two letters."""
    if not all(t.kind in ("text", "word", "letter") or t.is_symbol("-", "'", "*", "?") for t in tokens):
        return False
    if len(tokens) == 1 and (_is_long(tokens[0], 2) or tokens[0].is_word("no")):  # `no` is no product
        return True
    return any((_is_long(t, 3) and t.spaced) or (t.kind == "text" and len(t.text) > 1) for t in tokens)


def _is_long(token: Token, letters: int) -> bool:
    return token.kind == "word" and len(token.text) > letters


def words_of(tokens: Sequence[Token]) -> tuple[str, ...]:
    """Words without case and full stops; whatever else there is, as it is spelt."""
    words = (t.text.lower().rstrip(".") if t.kind in ("text", "word") else spell([t]) for t in tokens)
    return tuple(word for word in words if word not in ("", ",", ";", "\\cdot"))


def without_minutes(tokens: Sequence[Token]) -> tuple[Sequence[Token], bool]:
    """22 deg 30' as the fraction of degrees that it is, and whether it was one."""
    kinds = [t.text if t.kind == "symbol" else t.kind for t in tokens]
    if kinds not in (["number", "deg", "number", "'"], ["number", "deg", "number", "'", "number", "'", "'"]):
        return tokens, False
    numbers = [Fraction(t.text) for t in tokens if t.kind == "number"]
    value = sum((number / 60**i for i, number in enumerate(numbers)), Fraction(0))
    parts = (Token("number", str(n)) for n in value.as_integer_ratio())
    return (Token("command", "frac"), *(Token("group", parts=(part,)) for part in parts)), True
