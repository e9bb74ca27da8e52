"""When two problems are the same one: duplicates within a set, overlap between sets.

Pure functions over texts. It knows nothing of where they come from.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_TYPESETTING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[!,;:()\[\] ]|[\s$~]")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")


def normal_form(problem: str) -> str:
    r"""One spelling for problems that differ only in typesetting: space, case, `$`, `\(`, `\dfrac`, width.

    What it makes equal is the same problem to a reader; a rewording is another text and is not found.
    """
    problem = _FRACTION.sub(r"\\frac", unicodedata.normalize("NFKC", problem))
    return _TYPESETTING.sub("", problem).rstrip(".?!").casefold()


def repeated(problems: Sequence[str]) -> list[int]:
    """Indices of the problems that stand earlier in the sequence too, the same but for white space."""
    seen: set[str] = set()
    again = []
    for i, problem in enumerate(problems):
        words = " ".join(problem.split())
        if words in seen:
            again.append(i)
        seen.add(words)
    return again


def shared(problems: Sequence[str], others: Iterable[str]) -> list[tuple[int, int]]:
    """(index, index among the others) of every problem that is one of the others, however it is typeset.

    Wider than `repeated`: a test problem in other typesetting still gives its answer away.
    """
    place: dict[str, int] = {}
    for j, other in enumerate(others):
        place.setdefault(normal_form(other), j)
    forms = map(normal_form, problems)
    return [(i, place[form]) for i, form in enumerate(forms) if form in place]
