"""The runs that plan.md counts, in the order in which they are made."""

import itertools

from benchmarks.study.arms import CORE
from benchmarks.study.results import Key

CORE_TASKS = ("synonyms", "countdown")
CORE_SEEDS = range(24)
SECONDS = 60.0  # a run, where none has been made yet


def runs() -> list[Key]:
    """The core: all arms of both tasks of one seed, then those of the next."""
    return [(task, arm, seed) for seed, task, arm in itertools.product(CORE_SEEDS, CORE_TASKS, CORE)]
