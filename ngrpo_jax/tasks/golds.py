"""Gold answers that no response can match: found when a set is loaded, not after a day of training.

Plain numbers and words are readable. The grader's processes read the rest; what was readable once is recorded
in a file of the user's cache, so that a set of 40,000 problems takes its time only once.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Sequence

from .grading import VERSION
from .grading.extraction import last_boxed
from .grading.plain import MAX_ANSWER, canonical, plain_number
from .rewards import Grader

MARKER = "####"  # before the answer of a GSM8K solution
MOST_UNREADABLE = 0.05  # of a set; a few wrong golds are usual, a wrong field is not
_SOLUTION_WORDS = 25

_WORD = re.compile(r"[A-Za-z]+(?: [A-Za-z]+){0,7}")
_DIGEST = re.compile(r"[0-9a-f]{16}")


def unreadable(golds: Sequence[str], grader: Grader, cache: pathlib.Path | None = None) -> list[int]:
    """Indices of the gold answers that cannot be read, or not within the grader's deadline.

    Args:
      golds: gold answers, with or without their box.
      grader: its processes read; none is started where plain reading settles every answer.
      cache: a file of readable answers, by digest, see `default_cache`; None: nothing is recorded. One that
        cannot be read or written is no error.
    """
    open_golds = list(dict.fromkeys(gold for gold in golds if not _is_plain(gold)))
    known = _known(cache)
    # Long golds are compared by spelling alone, and no response repeats a whole solution.
    verdicts = {gold: False for gold in open_golds if len(gold) > MAX_ANSWER or is_solution(gold)}
    questions = [gold for gold in open_golds if gold not in verdicts and _digest(gold) not in known]
    verdicts |= zip(questions, grader.readable(questions), strict=True)
    _record(cache, [gold for gold, fine in verdicts.items() if fine])
    return [i for i, gold in enumerate(golds) if not verdicts.get(gold, True)]


def is_solution(gold: str) -> bool:
    """Whether a gold answer is a whole worked solution rather than its result."""
    return MARKER in gold or len(gold.split()) > _SOLUTION_WORDS


def refusal(source: str, golds: Sequence[str], bad: Sequence[int]) -> str | None:
    """Why a set cannot be trained or evaluated on, in one sentence; None where it can.

    Args:
      bad: indices of unreadable golds, as `unreadable` gives them.
    """
    if len(bad) <= MOST_UNREADABLE * len(golds):
        return None
    share = f"{len(bad)} of {len(golds)} gold answers of {source}"
    solutions = [golds[i] for i in bad if is_solution(golds[i])]
    if 2 * len(solutions) > len(bad):
        marked = sum(MARKER in gold for gold in solutions)
        how = (
            f"add answer_after={MARKER} after the source's question mark to take what follows {MARKER}"
            if 2 * marked > len(solutions)
            else "give the result alone in the field of the answer, or name another field by answer=FIELD"
        )
        return f"{share} are whole solutions, with which no response agrees; {how}"
    return f"{share} cannot be read as an answer; correct them, or name another field by answer=FIELD"


def default_cache() -> pathlib.Path:
    """The file of readable answers; each version of the rules and of math-verify has its own."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    version = f"{VERSION}-{importlib.metadata.version('math-verify')}"
    return pathlib.Path(root) / "ngrpo_jax" / f"readable_golds-{version}.txt"


def _is_plain(gold: str) -> bool:
    if len(gold) > MAX_ANSWER:
        return False
    text = canonical(last_boxed(gold) or gold)
    return plain_number(text) is not None or _WORD.fullmatch(text) is not None


def _digest(gold: str) -> str:
    return hashlib.sha256(gold.encode(errors="surrogatepass")).hexdigest()[:16]


def _known(cache: pathlib.Path | None) -> set[str]:
    try:
        lines = cache.read_text(encoding="ascii", errors="replace").split("\n") if cache else []
    except OSError:
        return set()
    return {line for line in lines if _DIGEST.fullmatch(line)}


def _record(cache: pathlib.Path | None, golds: Sequence[str]) -> None:
    if cache is None or not golds:
        return
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "a", encoding="ascii") as file:  # one write: runs that end together do not mix lines
            file.write("".join(f"{_digest(gold)}\n" for gold in golds))
    except OSError:
        return
