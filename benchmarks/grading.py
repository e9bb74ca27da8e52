"""Grading: verdicts a second, with nothing remembered from before.

    python benchmarks/grading.py [--data=math500.jsonl] [--workers=2] [--numbers=20000]

Plain numbers, half of them wrong, each in a response of some hundred words; and MATH answers, each held
against the answer of another problem: on MATH-500, four in ten take algebra. `--data` is any JSONL with a
field `answer`; without it a small set of such answers is made. Starting the workers is not counted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ngrpo_jax.runtime import console
from ngrpo_jax.tasks.rewards import Grader

FORMS = (
    "{}",
    "\\frac{{{}}}{{7}}",
    "{}\\sqrt{{3}}",
    "x^2+{}x",
    "({}, \\pi)",
    "[{}, \\infty)",
    "\\text{{term }}{}",
)
WORDS = "so the next step follows from the one before it and " * 25


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--numbers", type=int, default=20_000)
    given = parser.parse_args()
    answers = _answers(given.data)
    numbers = [str(7 * i) for i in range(given.numbers)]
    wrong = [str(7 * i + i % 2) for i in range(given.numbers)]
    rows = [
        ("plain numbers, half of them wrong", *_measure(numbers, wrong, given.workers)),
        (
            "MATH answers against another problem's",
            *_measure(answers, answers[1:] + answers[:1], given.workers),
        ),
    ]
    print(f"{given.workers} workers, {platform.machine()}, Python {platform.python_version()}")
    print(console.table(rows, ("", "verdicts/s", "verdicts", "by reading alone", "timed out")))


def _answers(path: pathlib.Path | None) -> list[str]:
    if path is None:
        return [FORMS[i % len(FORMS)].format(i + 2) for i in range(500)]
    return [
        json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]


def _measure(answers: list[str], golds: list[str], workers: int) -> tuple[float, int, int, int]:
    """(verdicts a second, verdicts, those by reading alone, time-outs) of a fresh grader."""
    with Grader(workers=workers) as grader:
        # Both workers are up before the clock starts: two questions that no batch holds.
        grader.grade(["\\boxed{q+1}", "\\boxed{q+2}"] * workers, ["1+q", "2+q"] * workers, "math")
        time.sleep(1.0)
        before = grader.snapshot()
        grader.grade([f"{WORDS}\\boxed{{{answer}}}." for answer in answers], golds, "math")
        batch = grader.counts.since(before)
    return batch.per_second, batch.graded, batch.by_rule, batch.timeouts


if __name__ == "__main__":
    main()
