r"""LaTeX as tokens in a normal form: one token for each thing, whatever it is spelt and decorated with.

Owns spelling: spaces, sizes, colours, fonts, synonyms of commands, digit groups, text mode, arguments,
environments. Must not know what an answer means. Pure, and linear in the length of the text.

A token is one of

    number   decimal digits with at most one point; also 1e-5, and 0.1(6) for a recurring decimal
    letter   a variable or constant in italics: x, or the name of a Greek letter
    word     two or more letters in italics: a product, a unit or text; who reads it decides
    text     a word in text mode, such as cm in \text{cm}
    command  frac, sqrt, sin, pi, ...; frac, binom and sqrt are followed by their arguments
    symbol   + - * / ^ _ ( ) [ ] { } | , ; : = ! ' and relations by name: le, ge, ne, in, approx, ...
    group    the tokens within TeX braces, and every argument; index: the index of a root
    matrix   rows of cells
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from . import tables
from .forms import Token, Tokens, UnreadableError, group, split, trim

_RELATIONS = ("=", "<", ">", "le", "ge", "approx")
_MAX_DEPTH = 40  # of braces; no gold has more than a few
_SPACE = r"(?:\s|~|\\[,;:> ]|\\q?quad(?![A-Za-z])|\\(?:thin|med|thick|en)space(?![A-Za-z]))"
# Between groups of three digits: {,} ,\! \, or a space; 2 125/3 is a mixed number.
_GROUPS = rf"[0-9]{{1,3}}(?:(?:\{{,(?:\\!)?\}}|,\\!\s*|{_SPACE}+)[0-9]{{3}})+(?![0-9]|{_SPACE}*/)"
_COMMAS = r"[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])"  # outside of brackets
_REST = (
    r"|[0-9]+)(?:\.[0-9]*\x1f[0-9]+\x1f|\.[0-9]+)?|\.[0-9]*\x1f[0-9]+\x1f|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z.]))?)"
    r"|(?P<row>\\\\\*?(?:\s*\[-?[0-9.]+\s*(?:pt|em|ex|mm|cm|in)\])?|\\newline(?![A-Za-z])|\\cr(?![A-Za-z]))"
    r"|(?P<environment>\\(?:begin|end)\s*\{[a-zA-Z]*\*?\})"
    r"|(?P<command>\\(?:[A-Za-z]+|[^A-Za-z]))"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<other>.)"
)
_WITHIN = re.compile(rf"(?P<space>{_SPACE}+)|(?P<number>(?:(?:{_GROUPS}{_REST}", re.DOTALL)
_OUTSIDE = re.compile(rf"(?P<space>{_SPACE}+)|(?P<number>(?:(?:{_GROUPS}|{_COMMAS}{_REST}", re.DOTALL)

# Of the whole text, before it becomes tokens.
_REPLACED = (
    (re.compile(r"^\s*(\*+|_+|`+)(.*)\1\s*$", re.DOTALL), r"\2"),  # Markdown
    (re.compile(r"([ap])\.\s?m\b\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"\\left\s*\\(?:\{|lbrace)\s*(?=\\begin)"), ""),  # of a system of equations
    (re.compile(r"(?<=[0-9])\s+x\s+(?=10\s*\^)"), r" \\times "),
    (re.compile(r"([<>])="), lambda match: "\\le " if match[1] == "<" else "\\ge "),
    (  # 0.1\overline{6}, 0.1\dot{6}, 0.\dot{1}4285\dot{7}, and 0.(16), as 0.1(6) with marks for the brackets
        re.compile(
            r"(\.[0-9]*)(?:\\(?:overline|bar)\s*(?:\{([0-9]+)\}|([0-9]))"
            r"|\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?|(?<=\.)\(([0-9]+)\))"
        ),
        "\\1\x1f\\2\\3\\4\\5\\6\\7\x1f",
    ),
    (re.compile(r"(?<!,)\\!"), ""),
)


class _Lexeme(NamedTuple):
    kind: str
    text: str
    spaced: bool = False


def tokenize(text: str) -> Tokens:
    """The tokens of an answer's LaTeX. Raises UnreadableError for braces nested too deeply."""
    text = "".join(c for c in text if c >= " " or c in "\t\n\r")
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return trim(_Builder(list(_lexemes(text))).sequence(""))


def _lexemes(text: str) -> Iterator[_Lexeme]:
    spaced, position, level = False, 0, 0
    while position < len(text):
        match = (_WITHIN if level else _OUTSIDE).match(text, position)
        assert match is not None and match.lastgroup is not None
        kind, found, position = match.lastgroup, match[0], match.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "number":
            found = re.sub(r"[^-+0-9.eE\x1f]", "", found).replace("\x1f", "(", 1).replace("\x1f", ")")
        level += (found in ("(", "[", "\\{")) - (found in (")", "]", "\\}"))
        yield _Lexeme(kind, found, spaced)
        spaced = False


class _Builder:
    """Lexemes to tokens, by recursive descent over braces, arguments and environments."""

    def __init__(self, lexemes: list[_Lexeme]):
        self._lexemes = lexemes[::-1]  # a stack: what an argument leaves over is pushed back
        self._depth = 0

    def sequence(self, closer: str, text_mode: bool = False) -> list[Token]:
        r"""Tokens up to `closer`, such as "}" or "\end", or to the end of the text."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnreadableError("braces are nested too deeply")
        tokens: list[Token] = []
        while self._lexemes:
            lexeme = self._lexemes.pop()
            if closer and lexeme.text.startswith(closer):
                break
            added = self._token(lexeme, text_mode)
            if added and lexeme.spaced:
                added[0] = added[0]._replace(spaced=True)
            tokens += added
        self._depth -= 1
        for i, token in enumerate(tokens):
            if token.is_command("over", "choose"):
                name = "frac" if token.text == "over" else "binom"
                return [Token("command", name), group(*tokens[:i]), group(*tokens[i + 1 :])]
        return tokens

    def _token(self, lexeme: _Lexeme, text_mode: bool) -> list[Token]:
        kind, text = lexeme.kind, lexeme.text
        if kind == "number":
            return [Token("number", text)]
        if kind == "letters":
            # min and sec with nothing behind them are units.
            unit = text in ("min", "sec") and self._peek() in ("", "}", "$", "/", ".", ",")
            return _letters(text, text_mode, not unit)
        if kind == "row":
            return [Token("symbol", "\\\\")]
        if kind == "environment":
            return self._environment(text) if text.startswith("\\begin") else []
        if kind == "command":
            return self._command(text[1:], text_mode)
        if text == "{":
            inner = self.sequence("}", text_mode)
            lone = len(inner) == 1 and inner[0].is_symbol(":", "=", "<", ">")  # 7{:}00
            return inner if lone or not inner else [group(*inner)]
        if text in "^_":
            return self._script(text)
        # Dollar signs delimit mathematics; the currency is written \$.
        return [] if text in '}$`\\"' or (text_mode and text in ".?\"'") else [Token("symbol", text)]

    def _script(self, mark: str) -> list[Token]:
        """A power or subscript; degrees and primes as postfix symbols."""
        argument = self._argument()
        if len(argument.parts) == 1 and argument.parts[0].is_symbol("deg", "'"):
            return [argument.parts[0]]
        return [Token("symbol", mark), argument] if argument.parts else []

    def _command(self, name: str, text_mode: bool) -> list[Token]:
        if name in tables.TEXT_MODE or name in tables.DROPPED_WITH_ARGUMENT:
            inner = self._braces(True)
            return inner if name in tables.TEXT_MODE else []
        if name in tables.DECORATION or name in "()[]":  # the latter delimit mathematics
            if name in ("left", "right") and self._peek() == ".":
                self._lexemes.pop()
            return []
        if name in tables.BOXES:
            for _ in range(tables.BOXES[name]):
                self._braces(True)
            return self._braces(text_mode)
        if name in tables.ALPHABETS:
            inner = self._braces(False)
            plain = any(token.kind == "number" for token in inner)
            return inner if plain else [Token("letter", name + "".join(token.text for token in inner))]
        if name in tables.SYMBOLS:
            return [Token("symbol", tables.SYMBOLS[name])]
        name = tables.RENAMED.get(name, name)
        command = Token("command", name)
        if name in ("frac", "binom"):
            return [command, self._argument(digits=True), self._argument(digits=True)]
        if name == "sqrt":
            return [command, *self._root()]
        letter = name != "pi" and (name in tables.GREEK.values() or name in tables.GREEK_VARIANTS)
        return [Token("letter", name) if letter else command]

    def _root(self) -> list[Token]:
        """[index,] radicand; a radicand in round brackets is left to who reads it."""
        index: list[Token] = []
        if self._peek() == "[":
            self._lexemes.pop()
            index = [Token("index", parts=tuple(self.sequence("]")))]
        if self._peek() == "(":
            return index
        if self._peek().isdigit() and len(self._peek()) > 1:  # TeX takes the first alone, a writer means all
            raise UnreadableError("a root of unbraced digits")
        return [*index, self._argument()]

    def _argument(self, digits: bool = False) -> Token:
        """The next argument as a group; of an unbraced number one of its `digits`, as in TeX, or all."""
        if not self._lexemes:
            return group()
        lexeme = self._lexemes.pop()
        if lexeme.kind == "number" and digits and len(lexeme.text) > 1:
            self._lexemes.append(_Lexeme("number", lexeme.text[1:]))
            lexeme = _Lexeme("number", lexeme.text[:1])
        taken = self._token(lexeme, False)
        sign = len(taken) == 1 and taken[0].is_symbol("+", "-")
        return group(*taken, *(self._argument(digits).parts if sign else ()))

    def _braces(self, text_mode: bool) -> list[Token]:
        """The tokens of the next group, without its braces."""
        if self._peek() == "*":
            self._lexemes.pop()
        if self._peek() != "{":
            return []
        self._lexemes.pop()
        return self.sequence("}", text_mode)

    def _peek(self) -> str:
        return self._lexemes[-1].text if self._lexemes else ""

    def _environment(self, begin: str) -> list[Token]:
        name = begin[begin.index("{") + 1 : -1]
        if name in ("array", "alignedat"):
            self._braces(False)
        body = self.sequence("\\end")
        rows = [tuple(map(trim, split(row, "&"))) for row in split(body, "\\\\")]
        rows = [row for row in rows if any(row)]
        system = any(token.is_symbol(*_RELATIONS) for token in body)
        lone = len(rows) == 1 and len(rows[0]) == 1
        if name in tables.MATRICES and not (name == "array" and (system or lone)):
            return [Token("matrix", name if name in ("vmatrix", "Vmatrix") else "pmatrix", tuple(rows))]
        if name in tables.ROWS or system:
            listed: list[Token] = []
            for row in rows:
                cells = sum(row, ())
                # A row that begins with a relation goes on with the one before.
                listed += [] if cells[0].is_symbol(*_RELATIONS) or not listed else [Token("symbol", ",")]
                listed += cells
            return listed
        return body


def _letters(text: str, text_mode: bool, function: bool) -> list[Token]:
    if text.lower() in tables.FUNCTIONS and function:
        return [Token("command", text.lower())]
    if text == "pi":
        return [Token("command", "pi")]
    if text_mode:
        return [Token("letter" if text in ("e", "i") else "text", text)]
    if text.lower() == "deg":
        return [Token("symbol", "deg")]
    return [Token("letter" if len(text) == 1 else "word", text)]
