"""Multiple choice: the letter of the right answer, and the text of a question with its options.

Public GPQA files have the right answer first in every row; here the options are shuffled, so that no
model can learn the position.
"""

import hashlib
import random
from collections.abc import Sequence

LETTERS = "ABCD"
_SEED = "gpqa-1"  # another order of options is another benchmark: a change needs a new version of the set


def balanced_letters(ids: Sequence[str]) -> list[str]:
    """The letter of the right answer for each question; letter counts differ by one at most.

    Questions are sorted by a random number that depends on the id alone, and get A, B, C, D in turn, so that
    the order of the file's rows has no effect.
    """
    order = sorted(range(len(ids)), key=lambda i: _generator(ids[i]).random())
    letters = [""] * len(ids)
    for rank, i in enumerate(order):
        letters[i] = LETTERS[rank % len(LETTERS)]
    return letters


def lay_out(question: str, right: str, wrong: Sequence[str], letter: str, question_id: str) -> str:
    """The question with its options: `right` under `letter`, the wrong ones shuffled by the id."""
    options = list(wrong)
    _generator(f"{question_id} wrong").shuffle(options)
    options.insert(LETTERS.index(letter), right)
    lines = [f"{name}) {option.strip()}" for name, option in zip(LETTERS, options, strict=True)]
    return "\n".join([question.strip(), "", *lines])


def _generator(text: str) -> random.Random:
    return random.Random(hashlib.sha256(f"{_SEED} {text}".encode()).digest())
