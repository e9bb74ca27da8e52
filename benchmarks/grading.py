"""Grading: verdicts a second, with nothing remembered from before.

    python benchmarks/grading.py [--data=math500.jsonl] [--workers=2] [--numbers=20000] [--earlier=DIR]

Plain numbers, half of them wrong, each in a response of some hundred words; and MATH answers, each held
against the answer of another problem, and against itself. `--data` is any JSONL with a field `answer`;
without it a small set of such answers is made. Starting the workers is not counted. `--earlier` names a
checkout of an earlier version of this project: both grade the answers against themselves in turns, each in
a process of its own, and the ratio of their times is printed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np

from benchmarks import measure
from ngrpo_jax.tasks.rewards import Grader

HERE = pathlib.Path(__file__).parent.parent
FORMS = (
    "{}",
    "\\frac{{{}}}{{7}}",
    "{}\\sqrt{{3}}",
    "x^2+{}x",
    "({}, \\pi)",
    "[{}, \\infty)",
    "\\text{{term }}{}",
)
ROUNDS = 7  # of both versions in turns
# Seconds of the answers of a file against themselves; earlier versions have other names of the method.
DRIVER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from ngrpo_jax.tasks.rewards import Grader
answers = json.load(sys.stdin)
with Grader(workers=int(sys.argv[2])) as grader:
    grade = getattr(grader, "grade", None) or grader.score
    grade(["\\\\boxed{q+1}", "\\\\boxed{q+2}"] * 4, ["1+q", "2+q"] * 4, "math")
    time.sleep(1.0)
    started = time.perf_counter()
    grade([f"\\\\boxed{{{answer}}}" for answer in answers], answers, "math")
    print(time.perf_counter() - started)
"""
WORDS = "so the next step follows from the one before it and " * 25


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--numbers", type=int, default=20_000)
    parser.add_argument("--earlier", type=pathlib.Path)
    parser.add_argument("--json", metavar="FILE", help="where the figures go as well")
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
        ("MATH answers against themselves", *_measure(answers, answers, given.workers)),
        (
            "the same in one more pair of braces",
            *_measure([f"{{{answer}}}" for answer in answers], answers, given.workers),
        ),
    ]
    report = measure.Report("Grading")
    headers = ("", "verdicts/s", "verdicts", "by reading alone", "timed out")
    report.table(f"Verdicts of {given.workers} grading processes", headers, rows)
    if given.earlier is not None:
        _compare(report, answers, given.earlier, given.workers)
    report.save(given.json)


def _compare(report: measure.Report, answers: list[str], earlier: pathlib.Path, workers: int) -> None:
    """How long both versions take for the answers against themselves, in turns."""
    seconds: dict[pathlib.Path, list[float]] = {HERE: [], earlier: []}
    for _ in range(ROUNDS):
        for checkout, times in seconds.items():
            command = [sys.executable, "-c", DRIVER, str(checkout), str(workers)]
            run = subprocess.run(
                command, input=json.dumps(answers), cwd=checkout, capture_output=True, text=True, check=True
            )
            times.append(float(run.stdout))
    ours, theirs = map(np.array, seconds.values())
    report.table(
        "MATH answers against themselves",
        ("", "seconds", "this version / it"),
        [
            ("this version", measure.interval(ours), None),
            ("the earlier one", measure.interval(theirs), measure.interval(ours / theirs)),
        ],
    )


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
    return batch.per_second, batch.graded, batch.plain, batch.timeouts


if __name__ == "__main__":
    main()
