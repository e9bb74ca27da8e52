r"""The final answer within a response: after `</think>`, in the last box, after "Answer:", the last number.

Pure functions over text, standard library only, linear in the length of what a model may write. Must not know
what an answer means.
"""

import re

_LAST_BOX, _BRACE = re.compile(r"\\boxed\s*\{"), re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\boxed\s*\{|\\(?=\\boxed\s*\{)|\\.|[{}]", re.DOTALL)


def after_thinking(response: str) -> str:
    """The text after the last `</think>`, or all of it where there is none."""
    return response.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{}` (of nested ones the inner), or None without one.

    Braces nest; `\{` and `\}` are no braces; a box that is never closed does not count.
    """
    last = _LAST_BOX.match(text, text.rfind("\\boxed")) if "\\boxed" in text else None
    if last is not None:
        level = 1
        for brace in _BRACE.finditer(text, last.end()):
            level += (brace[0] == "{") - (brace[0] == "}")
            if level == 0:
                return text[last.end() : brace.start()]
    return _last_closed(text)


def _last_closed(text: str) -> str | None:
    """`last_boxed` of any text, read from its beginning: the last box may never be closed."""
    opened: list[int | None] = []  # where the content of a box begins, None for other braces
    found = (-1, -1)
    for token in _BOX.finditer(text):
        kind = token[0]
        if kind == "{":
            opened.append(None)
        elif kind.startswith("\\boxed"):
            opened.append(token.end())
        elif kind == "}" and opened:
            start = opened.pop()
            if start is not None and start > found[0]:
                found = (start, token.start())
    return text[slice(*found)] if found[0] >= 0 else None


_ANY_NUMBER = re.compile(r"-?\d(?:[\d,.]*\d)?")
_LAST_CHARACTERS = 1000  # where a last number is searched


def last_number(text: str) -> str | None:
    """The last number of a text as written, without the punctuation after it; None where there is none."""
    numbers = _ANY_NUMBER.findall(text[-_LAST_CHARACTERS:])
    return numbers[-1] if numbers else None


_LETTER = re.compile(
    r"(?<![A-Za-z])(?i:answer)[\s*_]*:(?:[\s*_`$(\[{<\"']|\\(?:boxed|text|textbf|mathrm|mathbf)(?![a-z])|\\[(\[])*"
    r"(?P<letter>[A-D])(?![A-Za-z0-9/])(?!\s*(?:,|/|&|or\b|and\b)\s*\(?[A-D](?![A-Za-z0-9]))"
)
# Not NFKC, whose time grows with the square of a run of combining marks: responses may be long.
_HALF_WIDTH = str.maketrans({chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)})


def choice_letter(text: str) -> str | None:
    r"""The letter of the last `Answer: X`, X from A to D, anywhere in a line; None without one.

    Bold marks, brackets, quotes, `\text{}`, `\boxed{}` and full-width characters are allowed; the prompt's
    "<A/B/C/D>" and hedges such as "A or B" are no answer.
    """
    letters = [match["letter"] for match in _LETTER.finditer(text.translate(_HALF_WIDTH))]
    return letters[-1] if letters else None


def gold_letter(gold: str) -> str:
    """The letter of a gold answer such as "B", "(b)" or "B."; empty where it has none."""
    stripped = gold.translate(_HALF_WIDTH).strip(" \t\r\n()[]{}.:*$").upper()
    return stripped if stripped in ("A", "B", "C", "D") else ""
