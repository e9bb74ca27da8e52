"""Duplicate problems within a set, and problems that two sets share.

Pure functions over texts. Must not know data sources.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_TYPESETTING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[!,;:()\[\] ]|[\s$~]")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")


def normal_form(problem: str) -> str:
    r"""One spelling for problems that differ only in typesetting: space, case, `$`, `\(`, `\dfrac`, width.

    Problems of one normal form are the same problem to a reader. A rewording has another normal form.
    """
    problem = _FRACTION.sub(r"\\frac", unicodedata.normalize("NFKC", problem))
    return _TYPESETTING.sub("", problem).rstrip(".?!").casefold()


def repeated(problems: Sequence[str]) -> list[int]:
    """Indices of the problems that an earlier one equals, white space aside."""
    first: dict[str, int] = {}
    return [i for i, problem in enumerate(problems) if first.setdefault(" ".join(problem.split()), i) != i]


def shared(problems: Sequence[str], others: Iterable[str]) -> list[tuple[int, int]]:
    """(index, index among the others) of every problem that has the normal form of one of the others.

    Wider than `repeated`: a test problem in other typesetting still gives its answer away.
    """
    places = list(enumerate(map(normal_form, others)))
    first = {form: j for j, form in reversed(places)}
    return [(i, first[form]) for i, form in enumerate(map(normal_form, problems)) if form in first]
