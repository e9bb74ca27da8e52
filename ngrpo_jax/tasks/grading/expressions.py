r"""Tokens to an expression tree: the grammar of what students and models write as one value.

Owns precedence, implied products, mixed numbers, arguments of functions. Whatever it does not cover is an
UnreadableError, never a guess: sums and integrals, dots, text. Must not know answers or values. Pure.

A node is a tuple whose first item is its kind:

    ("number", Fraction, decimal?)     ("letter", name)     ("constant", "pi" | "e" | "i" | "infinity")
    ("sum", a, b)  ("product", a, b)  ("quotient", a, b)  ("power", a, b)  ("minus", a)
    ("root", n, a)  ("factorial", a)  ("binomial", n, k)  ("absolute", a)  ("floor", a)  ("ceiling", a)
    ("function", name, a)  ("log", base or None, a)  ("degrees", a)
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .forms import Token, UnreadableError, spell
from .tables import NUMBER_WORDS

Node = tuple[Any, ...]

_MAX_DIGITS = 1000
_TWO: Node = ("number", Fraction(2), False)
_END = Token("end")
_TRIGONOMETRIC = frozenset({"sin", "cos", "tan", "cot", "sec", "csc"})
_LOGARITHMS = frozenset({"log", "ln", "lg"})
_FUNCTIONS = (
    _TRIGONOMETRIC | {f"arc{name}" for name in _TRIGONOMETRIC} | _LOGARITHMS | {"sinh", "cosh", "tanh", "exp"}
)
_BASES: dict[str, Node] = {"ln": ("constant", "e"), "lg": ("number", Fraction(10), False)}
_BINARY = {"frac": "quotient", "binom": "binomial"}
_CONSTANTS = {"pi": "pi", "infty": "infinity"}
_ACCENTS = frozenset(
    {"overline", "bar", "vec", "hat", "tilde", "widehat", "overrightarrow", "dot", "mathring"}
)
_CLOSING = {"(": ")", "[": "]", "|": "|", "lfloor": "rfloor", "lceil": "rceil"}
_ENCLOSED = {"|": "absolute", "lfloor": "floor", "lceil": "ceiling"}


def parse(tokens: Sequence[Token]) -> Node:
    """The expression that is the whole of `tokens`; UnreadableError where there is none."""
    if not tokens:
        raise UnreadableError("an empty expression")
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.peek() is not _END:
        raise UnreadableError(f"{spell(tokens[parser.position :])} is left over")
    return node


def letters(node: Node) -> frozenset[str]:
    """The variables of an expression."""
    if node[0] == "letter":
        return frozenset({node[1]})
    return frozenset().union(*(letters(part) for part in node[1:] if isinstance(part, tuple)))


def has(node: Node, *kinds: str) -> bool:
    """Whether a node of one of these kinds is anywhere in an expression."""
    return node[0] in kinds or any(has(part, *kinds) for part in node[1:] if isinstance(part, tuple))


def is_decimal(node: Node) -> bool:
    """Whether a number with a decimal point, which may be rounded, is anywhere in an expression."""
    if node[0] == "number":
        return bool(node[2])
    return any(is_decimal(part) for part in node[1:] if isinstance(part, tuple))


def number_node(text: str) -> Node:
    """The node of a number as written: 12, 0.5, .5, 6.02e23, and 0.1(6) for a recurring decimal."""
    if len(text) > _MAX_DIGITS:
        raise UnreadableError("a number of too many digits")
    recurring = re.fullmatch(r"([0-9]*)\.([0-9]*)\(([0-9]+)\)", text)
    if recurring is None:
        return ("number", Fraction(text), "." in text or "e" in text.lower())
    whole, start, period = recurring.groups()
    ninths = Fraction(int(period), 10 ** len(period) - 1)
    return ("number", int(whole or "0") + (int(start or "0") + ninths) / 10 ** len(start), False)


class _Parser:
    """Recursive descent over one sequence of tokens; groups are parsed by parsers of their own."""

    def __init__(self, tokens: Sequence[Token]):
        self._tokens = [*tokens, _END, _END, _END, _END]
        self.position = 0

    def peek(self, ahead: int = 0) -> Token:
        """The next token; `_END` at the end."""
        return self._tokens[self.position + ahead]

    def _take(self) -> Token:
        token = self.peek()
        self.position += token is not _END
        return token

    def _take_if(self, *symbols: str) -> bool:
        taken = self.peek().is_symbol(*symbols)
        self.position += taken
        return taken

    def _group(self) -> Node:
        return parse(self._take().parts)

    def sum(self) -> Node:
        """Terms joined by + and -."""
        node = self._product()
        while self.peek().is_symbol("+", "-"):
            minus = self._take().text == "-"
            term = self._product()
            node = ("sum", node, ("minus", term) if minus else term)
        return node

    def _product(self) -> Node:
        """Factors joined by * and / or by standing side by side, from left to right."""
        node = self._factor()
        while True:
            if self.peek().is_symbol("*", "/"):
                kind = "product" if self._take().text == "*" else "quotient"
                node = (kind, node, self._factor())
            elif self._starts_factor():
                node = ("product", node, self._factor())
            else:
                return node

    def _starts_factor(self) -> bool:
        token = self.peek()
        if token.kind == "symbol":
            return token.text in ("(", "[", "lfloor", "lceil")
        return token is not _END and (
            token.kind != "text" or len(token.text) == 1 or token.text.lower() in NUMBER_WORDS
        )

    def _factor(self) -> Node:
        """A primary with signs before it and postfixes behind: !, powers, degrees."""
        if self.peek().is_symbol("+", "-"):
            minus = self._take().text == "-"
            node = self._factor()
            return ("minus", node) if minus else node
        node = self._mixed_number() or self._primary()
        while True:
            if self._take_if("!"):
                node = ("factorial", node)
            elif self._take_if("deg"):
                node = ("degrees", node)
            elif self._take_if("^"):
                node = ("power", node, self._group())
            else:
                return node

    def _mixed_number(self) -> Node | None:
        r"""2\frac{1}{2} and 2 1/2: a whole number and a proper fraction, their sum."""
        second = self.peek(1)
        slashed = second.kind == "number" and second.spaced and self.peek(2).is_symbol("/")
        if not (slashed or second.is_command("frac")):
            return None
        numbers = (self.peek(), second if slashed else self.peek(2), self.peek(3))
        whole, above, below = map(_whole, numbers)
        if whole is None or above is None or below is None or not 0 < above < below:
            return None
        self.position += 4
        return ("number", whole + Fraction(above, below), False)

    def _primary(self) -> Node:
        token = self.peek()
        if token.is_symbol("(", "[", "|", "lfloor", "lceil"):
            return self._bracketed()
        self._take()
        if token.kind == "number":
            if self.peek().kind == "number" or self.peek().is_symbol("_"):
                raise UnreadableError("two numbers side by side, or a numeral in another base")
            return number_node(token.text)
        if token.kind == "group":
            return parse(token.parts)
        if token.is_word(*NUMBER_WORDS):
            return ("number", Fraction(10 ** NUMBER_WORDS[token.text.lower()]), False)
        if token.kind in ("letter", "word") or (token.kind == "text" and len(token.text) == 1):
            return self._letters(token)
        if token.kind == "command":
            return self._command(token.text)
        raise UnreadableError(f"{spell([token])} is no operand")

    def _letters(self, token: Token) -> Node:
        """A letter with its subscript and primes; of a word in italics these are the last letter's."""
        *first, last = list(token.text) if token.kind == "word" else [token.text]
        node = _named(last + self._marks())
        if first and self._take_if("^"):
            node = ("power", node, self._group())
        for letter in reversed(first):
            node = ("product", _named(letter), node)
        return node

    def _marks(self) -> str:
        """Subscript and primes, as part of a name."""
        marks = ""
        while self.peek().is_symbol("_", "'"):
            marks += self._take().text
            marks += spell(self._take().parts) if marks.endswith("_") else ""
        return marks

    def _command(self, name: str) -> Node:
        if name in _BINARY:
            return (_BINARY[name], self._group(), self._group())
        if name == "sqrt":
            index = self._group() if self.peek().kind == "index" else _TWO
            return ("root", index, self._primary())
        if name in _FUNCTIONS:
            return self._function(name)
        if name in _CONSTANTS:
            return ("constant", _CONSTANTS[name])
        if name in _ACCENTS and self.peek().kind == "group":
            return ("letter", f"{name} {spell(self._take().parts)}{self._marks()}")
        if name in ("angle", "triangle"):
            return ("letter", f"{name} {spell([self._take()])}")
        raise UnreadableError(f"\\{name} is not read")

    def _function(self, name: str) -> Node:
        """A function or logarithm, with its base and power, and its argument."""
        base = _BASES.get(name)
        if name == "log" and self._take_if("_"):
            base = self._group()
        exponent = self._group() if self._take_if("^") else None
        argument = self._argument()
        if exponent == ("minus", ("number", Fraction(1), False)) and name in _TRIGONOMETRIC:
            return ("function", f"arc{name}", argument)
        node: Node = ("log", base, argument) if name in _LOGARITHMS else ("function", name, argument)
        return node if exponent is None else ("power", node, exponent)

    def _argument(self) -> Node:
        """What a function applies to: brackets or braces alone, else the factors up to the next function."""
        if self._take_if("-"):
            return ("minus", self._argument())
        if self.peek().is_symbol("(", "[", "|") or self.peek().kind == "group":
            node = self._primary()
            return ("degrees", node) if self._take_if("deg") else node
        node = self._factor()
        while self._starts_factor() or self.peek().is_symbol("/"):
            if self.peek().is_symbol("(", "[") or self.peek().is_command(*_FUNCTIONS):
                break
            kind = "quotient" if self._take_if("/") else "product"
            node = (kind, node, self._factor())
        return node

    def _bracketed(self) -> Node:
        opening = self._take().text
        node = self.sum()
        if not self._take_if(_CLOSING[opening]):
            raise UnreadableError(f"{_CLOSING[opening]} is missing")
        return (_ENCLOSED[opening], node) if opening in _ENCLOSED else node


def _whole(token: Token) -> int | None:
    """A whole number, alone or in a group; None for anything else."""
    if token.kind == "group" and len(token.parts) == 1:
        token = token.parts[0]
    return int(token.text) if token.kind == "number" and token.text.isdigit() else None


def _named(name: str) -> Node:
    return ("constant", name) if name in ("e", "i") else ("letter", name)
