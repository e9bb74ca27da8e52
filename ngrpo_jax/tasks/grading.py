r"""What a response's answer is, and whether plain reading already settles if it is right.

Pure functions over text, standard library only, linear in the length of what a model may write. It does
not know math-verify, processes or deadlines: `rewards` asks here first and sends on what stays open.
"""

import functools
import re
import unicodedata
from fractions import Fraction

# No gold answer is nearly as long; beyond it an answer is compared as it stands.
MAX_ANSWER = 4096

_BOX = re.compile(r"\\boxed\s*\{|\\(?=\\boxed\s*\{)|\\.|[{}]", re.DOTALL)


def after_thinking(response: str) -> str:
    """The text after the last `</think>`, or all of it where there is none."""
    return response.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{}` (of nested ones the inner), or None without one.

    Braces nest; `\{` and `\}` are no braces; a box that is never closed does not count.
    """
    if "\\boxed" not in text:
        return None
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


_GREEK = {
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta"},
    **{"θ": "theta", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho"},
    **{"σ": "sigma", "τ": "tau", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma"},
    **{"Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi"},
    "Ω": "Omega",
}
_SYMBOLS = str.maketrans(
    {letter: f"\\{name} " for letter, name in _GREEK.items()}
    | {"×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "\\div ", "±": "\\pm ", "∞": "\\infty "}
    | {"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap "}
    | {"∅": "\\emptyset ", "°": "^\\circ ", "⁄": "/", "∕": "/", "∶": ":"}
    | dict.fromkeys("−–—‐‑", "-")
)
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

    text = _ROOT.sub(root, _SCRIPTS.sub(script, _VULGAR.sub(fraction, text)))
    return unicodedata.normalize("NFKC", text).translate(_SYMBOLS).strip().removesuffix(".")


_SPACING = re.compile(r"(\\\\)|\\[!,;: ]|\\q?quad(?![a-zA-Z])|~")
_SIZING = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}\\]*)\}")


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    r"""One spelling for answers that differ in typesetting only: space, `\dfrac`, `\left`, `$`, full stop."""
    text = _SPACING.sub(lambda m: m[1] or " ", to_latex(text))
    text = _SIZING.sub("", text).replace("{,}", ",")
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


_ANY_NUMBER = re.compile(r"-?\d(?:[\d,.]*\d)?")
_LAST_CHARACTERS = 1000  # where a last number is looked for


def last_number(text: str) -> str | None:
    """The last number of a text as written, without the punctuation behind it; None where there is none."""
    numbers = _ANY_NUMBER.findall(text[-_LAST_CHARACTERS:])
    return numbers[-1] if numbers else None


@functools.lru_cache(maxsize=4096)
def plain_number(text: str) -> tuple[Fraction, bool] | None:
    r"""(exact value, written as a decimal?) of 7,425,000, .4, 1e3, 3/4 or \frac{3}{4}, spelt canonically."""
    if _DECIMAL.fullmatch(text):
        written = text.replace(",", "").replace(" ", "")
        return Fraction(written), "." in written or "e" in written.lower()
    quotient = _QUOTIENT.fullmatch(text)
    if quotient is None:
        return None
    above = quotient["a"] or quotient["c"] or quotient["e"]
    below = quotient["b"] or quotient["d"] or quotient["f"]
    above, below = (int(part.replace(",", "").replace(" ", "")) for part in (above, below))
    if below == 0:
        return None
    return Fraction(above, below) * (-1 if quotient["sign"] == "-" else 1), False


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Whether `answer` is `gold`, or None where it takes algebra to say.

    Equal canonical spelling is equal. Two plain numbers are compared exactly, but where one is a decimal
    and the gold is no integer, as math-verify does: by rounding to six places; and since that makes all
    small numbers equal, they must also agree to five significant digits.
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
    if a == g or g.denominator == 1 or not (a_decimal or g_decimal):
        return a == g
    return round(a, 6) == round(g, 6) and abs(a - g) <= Fraction(1, 10**5) * abs(g)


_LETTER = re.compile(
    r"(?<![A-Za-z])(?i:answer)[\s*_]*:(?:[\s*_`$(\[{<\"']|\\(?:boxed|text|textbf|mathrm|mathbf)(?![a-z])|\\[(\[])*"
    r"(?P<letter>[A-D])(?![A-Za-z0-9/])(?!\s*(?:,|/|&|or\b|and\b)\s*\(?[A-D](?![A-Za-z0-9]))"
)


# Not NFKC, whose time grows with the square of a run of combining marks: responses may be long.
_HALF_WIDTH = str.maketrans({chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)})


def choice_letter(text: str) -> str | None:
    r"""The letter of the last `Answer: X`, X from A to D, anywhere in a line; None without one.

    Bold marks, brackets, quotes, `\text{}`, `\boxed{}` and full-width characters are tolerated; the prompt's
    own "<A/B/C/D>" and hedges such as "A or B" are no answer.
    """
    letters = [match["letter"] for match in _LETTER.finditer(text.translate(_HALF_WIDTH))]
    return letters[-1] if letters else None


def gold_letter(gold: str) -> str:
    """The letter of a gold answer such as "B", "(b)" or "B."; empty where it has none."""
    stripped = gold.translate(_HALF_WIDTH).strip(" \t\r\n()[]{}.:*$").upper()
    return stripped if stripped in ("A", "B", "C", "D") else ""
