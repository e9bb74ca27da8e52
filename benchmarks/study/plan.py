"""The runs that plan.md counts, in the order in which they are made."""

import itertools

from benchmarks.study.arms import CORE
from benchmarks.study.store import Key

CORE_TASKS = ("synonyms", "countdown")
CORE_SEEDS = range(1, 25)  # the pilots have others
CONTROLS = {"synonyms": ("base", "base_ngrpo", "base_k1", "base_random"), "countdown": ("base",)}
CONTROL_SEEDS = range(1, 9)
OTHERS = (
    "matched",
    "temperature",
    "sampled_token",
    "release_weights",
    "stht",
    "gumbel",
    "no_loss_on_mixed",
    "rate020",
)
OTHER_TASKS = ("synonyms",)
OTHER_SEEDS = range(1, 4)
SECONDS = 60.0  # a run, where none has been made yet


def runs() -> list[Key]:
    """Core and controls seed by seed, all tasks and arms of one seed before the next; then the other arms."""
    found = list[Key]()
    for seed in CORE_SEEDS:
        for task in CORE_TASKS:
            arms = (*(CONTROLS[task] if seed in CONTROL_SEEDS else ()), *CORE)
            found += [(task, arm, seed) for arm in arms]
    return found + [
        (task, arm, seed) for seed, task, arm in itertools.product(OTHER_SEEDS, OTHER_TASKS, OTHERS)
    ]
