"""Multiple choice: which letter the right answer gets, and how a question with its options reads.

Public GPQA files name the right answer first in every row; a model must not be able to learn from the order.
"""

import hashlib
import random
from collections.abc import Sequence

LETTERS = "ABCD"
_SEED = "gpqa-1"  # another order of choices is another benchmark: never changed without a new version


def balanced_letters(ids: Sequence[str]) -> list[str]:
    """The letter of the right answer for each question: every letter as often as any other, but for the rest.

    Each question draws a number from its id alone; the letters go round in the order of those numbers, so
    that the order of the file's rows does not matter.
    """
    drawn = sorted(range(len(ids)), key=lambda i: _drawn(ids[i]).random())
    letters = [""] * len(ids)
    for rank, i in enumerate(drawn):
        letters[i] = LETTERS[rank % len(LETTERS)]
    return letters


def lay_out(question: str, right: str, wrong: Sequence[str], letter: str, question_id: str) -> str:
    """The question with its options, `right` under `letter` and the wrong ones shuffled by the id alone."""
    options = list(wrong)
    _drawn(f"{question_id} wrong").shuffle(options)
    options.insert(LETTERS.index(letter), right)
    lines = [f"{name}) {option.strip()}" for name, option in zip(LETTERS, options, strict=True)]
    return "\n".join([question.strip(), "", *lines])


def _drawn(text: str) -> random.Random:
    return random.Random(hashlib.sha256(f"{_SEED} {text}".encode()).digest())
