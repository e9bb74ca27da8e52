"""Gold answers that no grader can read: found when a set is loaded, not after a day of training.

Plain numbers and words settle themselves; the rest is parsed by the grader's workers, and what was readable
once is remembered in a file of the user's cache, so that a set of 40,000 problems costs its time only once.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Sequence

from .grading import MAX_ANSWER, canonical, last_boxed, plain_number
from .rewards import Grader

_WORD = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*")
_DIGEST = re.compile(r"[0-9a-f]{16}")


def unreadable(golds: Sequence[str], grader: Grader, cache: pathlib.Path | None = None) -> list[int]:
    """Indices of the gold answers that math-verify cannot parse, or not within the grader's deadline.

    Args:
      golds: gold answers, with or without their box.
      grader: whose workers parse; none is started where plain reading settles every answer.
      cache: a file of readable answers, by digest, see `default_cache`; None: nothing is remembered. One that
        cannot be read or written is no error.
    """
    open_golds = list(dict.fromkeys(gold for gold in golds if not _is_plain(gold)))
    known = _known(cache)
    verdicts = {gold: False for gold in open_golds if len(gold) > MAX_ANSWER}  # graded by spelling alone
    asked = [gold for gold in open_golds if gold not in verdicts and _digest(gold) not in known]
    verdicts |= zip(asked, grader.readable(asked), strict=True)
    _remember(cache, [gold for gold, fine in verdicts.items() if fine])
    return [i for i, gold in enumerate(golds) if not verdicts.get(gold, True)]


def default_cache() -> pathlib.Path:
    """Where readable answers are remembered; another version of math-verify has another file."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    version = importlib.metadata.version("math-verify")
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


def _remember(cache: pathlib.Path | None, golds: Sequence[str]) -> None:
    if cache is None or not golds:
        return
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "a", encoding="ascii") as file:  # one write: runs that end together do not mix lines
            file.write("".join(f"{_digest(gold)}\n" for gold in golds))
    except OSError:
        return
