"""Search problems: join all the given numbers, two at a time, so that the last result is the target.

"7*3=21;21+12=33" joins 3, 7 and 12 to 33. Several solutions are the rule, and a program checks them.
Must not know words, tokens or models: numbers and signs alone.
"""

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
COMMUTATIVE = ("+", "*")
HELD_OUT_SHARE = 4  # one problem in so many is held out


@dataclasses.dataclass(frozen=True)
class Family:
    """Problems of `count` numbers from 1 to `largest`, whose results all lie in 1..`bound`."""

    count: int
    largest: int
    bound: int
    signs: str = "+-*"


class Step(NamedTuple):
    """left sign right = result."""

    left: int
    sign: str
    right: int
    result: int


class Problem(NamedTuple):
    """The numbers, in the order in which they are given, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def held_out(self) -> bool:
        """Whether the problem is kept for evaluation; the order of its numbers does not matter."""
        return in_held_out(f"{sorted(self.numbers)} {self.target}")


def in_held_out(text: str) -> bool:
    """Whether what the text describes is kept for evaluation: a hash of it decides, for all seeds alike."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def play(family: Family, rng: random.Random) -> tuple[Problem, list[Step]]:
    """A problem and one of its solutions: random numbers are joined at random, to what is the target."""
    while True:
        numbers = tuple(rng.randint(1, family.largest) for _ in range(family.count))
        items, steps = list(numbers), list[Step]()
        while len(items) > 1:
            left, right = (items.pop(rng.randrange(len(items))) for _ in range(2))
            sign = rng.choice(family.signs)
            steps.append(Step(left, sign, right, SIGNS[sign](left, right)))
            items.append(steps[-1].result)
        if all(1 <= step.result <= family.bound for step in steps):
            return Problem(numbers, items[0]), steps


def solves(problem: Problem, steps: Sequence[Step]) -> bool:
    """Whether the steps use every number once, are right, and end at the target."""
    items = list(problem.numbers)
    for left, sign, right, result in steps:
        for used in (left, right):
            if used not in items:
                return False
            items.remove(used)
        if SIGNS[sign](left, right) != result:
            return False
        items.append(result)
    return items == [problem.target]


def path(steps: Sequence[Step]) -> str:
    """A solution's name, equal where solutions differ in the order of the operands of + and * alone."""
    return ";".join(_name(step) for step in steps)


def _name(step: Step) -> str:
    left, right = step.left, step.right
    if step.sign in COMMUTATIVE and left > right:
        left, right = right, left
    return f"{left}{step.sign}{right}={step.result}"


def parse(words: Sequence[str]) -> list[Step] | None:
    """Steps of "7 * 3 = 21 ; 21 + 12 = 33" as a list of words; None for anything else."""
    if len(words) % 6 != 5:
        return None
    steps = []
    for at in range(0, len(words), 6):
        left, sign, right, equals, result, *stop = words[at : at + 6]
        numbers = left.isdecimal() and right.isdecimal() and result.isdecimal()
        if sign not in SIGNS or equals != "=" or not numbers or stop not in ([], [";"]):
            return None
        steps.append(Step(int(left), sign, int(right), int(result)))
    return steps
