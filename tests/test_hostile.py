"""Text that nobody meant to be graded: no exception, no hang, no process left behind."""

import os
import pathlib
import random
import time

import pytest

from ngrpo_jax.tasks.rewards import Grader, choice_reward

FRAGMENTS = (
    *(
        "\\frac",
        "\\sqrt",
        "\\left",
        "\\right",
        "\\text",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\cdot",
        "\\pi",
    ),
    *(
        "\\infty",
        "\\in",
        "\\cup",
        "\\pm",
        "\\le",
        "\\int",
        "\\sum",
        "\\log",
        "\\binom",
        "\\boxed",
        "\\%",
        "\\$",
    ),
    *(
        "{",
        "}",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "^",
        "_",
        "!",
        "|",
        ",",
        "=",
        "<",
        "+",
        "-",
        "*",
        "/",
        "&",
        "\\\\",
    ),
    *(
        "0",
        "1",
        "9",
        "27",
        "1000000",
        "3.14",
        ".5",
        "1e9",
        "x",
        "y",
        "n",
        "i",
        "e",
        "½",
        "√",
        "π",
        "²",
        "∞",
        "≤",
    ),
    *(" ", "$", "~", "\\", "'", '"', "#", "Answer: B", "</think>", "\n", "\0", "\u0301", "\u202e", "\ud800"),
)
GOLDS = ("5", "\\frac{1}{2}", "x+1", "(1, 2)", "\\pi", "[0, \\infty)", "x = 3", "2^{10}", "\\text{Evelyn}")
HOSTILE = {
    "a tower of powers": "9^{9^9}",
    "a factorial": "10000000!",
    "deep fractions": "\\frac{1}{" * 400 + "x" + "}" * 400,
    "a long sum": "+".join(f"\\sqrt{{{n}}}" for n in range(2, 400)),
    "a large power of a sum": "(x+y+z+1)^{500}",
    "a matrix of powers": "\\begin{pmatrix}" + "&".join(["9^{9^9}"] * 30) + "\\end{pmatrix}",
}


def text(rng):
    """Random bytes, or a run of LaTeX fragments, with or without a box around them."""
    if rng.random() < 0.5:
        raw = rng.randbytes(rng.randint(0, 60))
        inner = raw.decode(*rng.choice([("latin-1",), ("utf-8", "surrogateescape"), ("utf-8", "replace")]))
    else:
        inner = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 25)))
    return inner if rng.random() < 0.1 else f"\\boxed{{{inner}}}"


def children(process):
    """(pid, state) of every process below `process`."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if int(parent) == process:
            found += [(int(folder.name), state), *children(int(folder.name))]
    return found


def survive(count, seed, deadline_s):
    """Grades so many texts one by one; the slowest call's seconds."""
    rng = random.Random(seed)
    before = set(children(os.getpid()))
    slowest = 0.0
    with Grader(workers=1, deadline_s=deadline_s) as grader:
        grader.grade(["\\boxed{x+1}"], ["1+x"], "math")
        for _ in range(count):
            response, gold = text(rng), rng.choice(GOLDS) if rng.random() < 0.9 else text(rng)
            begun = time.monotonic()
            assert grader.grade([response], [gold], "math")[0] in (0.0, 1.0)
            slowest = max(slowest, time.monotonic() - begun)
            assert choice_reward(response, gold) in (0.0, 1.0)
        mine = set(children(os.getpid())) - before
        assert mine and not [pid for pid, state in mine if state == "Z"]
        assert grader.grade(["\\boxed{y+1}"], ["1+y"], "math") == [1.0]
    assert grader.counts.graded == count + 2
    assert not {pid for pid, _ in mine} & {pid for pid, _ in children(os.getpid())}
    return slowest


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_random_texts_are_survived():
    survive(300, seed=1, deadline_s=2.0)


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_ten_thousand_random_texts_are_survived_within_the_deadline():
    assert survive(10_000, seed=2, deadline_s=2.0) < 3.0


@pytest.mark.long
@pytest.mark.parametrize("name", HOSTILE)
def test_no_call_takes_a_second_more_than_its_deadline(name):
    with Grader(workers=1, deadline_s=1.0) as grader:
        grader.grade(["\\boxed{x+1}"], ["1+x"], "math")
        for gold in ("5", "x+1", HOSTILE[name] + "+1"):
            begun = time.monotonic()
            assert grader.grade([f"\\boxed{{{HOSTILE[name]}}}"], [gold], "math") == [0.0]
            assert time.monotonic() - begun < 2.0
