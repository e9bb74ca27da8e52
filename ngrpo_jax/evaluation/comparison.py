"""Two evaluations held against each other, problem by problem: who solves what.

Owns the pairing of stored generations and its words; the statistics are `analysis.paired`'s.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from ngrpo_jax.errors import require
from ngrpo_jax.evaluation import generations
from ngrpo_jax.evaluation.generations import Generations
from ngrpo_jax.evaluation.statistics import paired
from ngrpo_jax.runtime import console


def compare(run_a: pathlib.Path, run_b: pathlib.Path) -> str:
    """The paired table of every data set that both runs have, with McNemar's test.

    Args:
      run_a, run_b: each a file of generations, or a workdir, whose newest step counts.

    Raises:
      ValueError, FileNotFoundError: nothing to read, or nothing in common; in one sentence.
    """
    sets_a, sets_b = _sets(run_a), _sets(run_b)
    if run_a.is_file() and run_b.is_file():
        pairs = [(next(iter(sets_a.values())), next(iter(sets_b.values())))]
    else:
        pairs = [(sets_a[name], sets_b[name]) for name in sets_a if name in sets_b]
    require(
        bool(pairs),
        f"{run_a} ({', '.join(sets_a)}) and {run_b} ({', '.join(sets_b)}) have no data set in common.",
    )
    return "\n\n".join(_compare(a, b) for a, b in pairs)


def _sets(run: pathlib.Path) -> dict[str, Generations]:
    """Data set -> generations of its newest step."""
    if run.is_dir():
        paths = generations.find(run)
        require(bool(paths), f"{run} has no generations_*.jsonl; run evaluate with --workdir={run} first.")
    else:
        paths = [run]
    found: dict[str, Generations] = {}
    for one in map(generations.read, paths):
        name = one.header["set"]
        if name not in found or one.header["step"] > found[name].header["step"]:
            found[name] = one
    return found


def _compare(a: Generations, b: Generations) -> str:
    graded_a, graded_b, dropped = _paired(a, b)
    samples = graded_a.shape[1]
    table = paired.paired_table(*(np.asarray(graded.any(axis=1)) for graded in (graded_a, graded_b)))
    rows: list[tuple[Any, ...]] = [
        ("both", table.both, _share(table.both, table)),
        ("only A", table.only_a, _share(table.only_a, table)),
        ("only B", table.only_b, _share(table.only_b, table)),
        ("neither", table.neither, _share(table.neither, table)),
    ]
    gap, low, high = paired.difference_interval(graded_a.mean(axis=1), graded_b.mean(axis=1))
    lines = [
        f"A  {a.path} ({a.label})",
        f"B  {b.path} ({b.label})",
        f"{table.total} problems, {samples} samples each; solved means one of them is right (Pass@{samples})",
        "",
        console.table(rows, ("solved by", "problems", "")),
        "",
        f"McNemar    p = {table.p_value:.3g} ({table.only_a} against {table.only_b})",
        f"Mean@{samples}    A {100 * graded_a.mean():.2f} %, B {100 * graded_b.mean():.2f} %; "
        f"B - A {100 * gap:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}",
    ]
    if dropped:
        lines.append(f"{dropped} problems stand in one of the two only, and are left out")
    return "\n".join(lines)


def _paired(a: Generations, b: Generations) -> tuple[np.ndarray, np.ndarray, int]:
    """(correct_PG of A, of B, problems that only one has): common problems, as many samples of each."""
    correct = [dict(zip(map(_key, one.problems), one.graded().correct_PG, strict=True)) for one in (a, b)]
    common = [key for key in correct[0] if key in correct[1]]
    require(bool(common), f"{a.path} and {b.path} have no finished problem in common.")
    samples = min(one.header["depends"]["eval.samples"] for one in (a, b))
    first, second = (np.array([of_run[key][:samples] for key in common]) for of_run in correct)
    return first, second, len(correct[0]) + len(correct[1]) - 2 * len(common)


def _key(rows: list[dict[str, Any]]) -> tuple[str, str]:
    return rows[0]["id"], rows[0].get("problem", "")


def _share(count: int, table: paired.Paired) -> str:
    return f"{100 * count / table.total:.1f} %"
