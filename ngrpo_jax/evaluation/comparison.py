"""Two evaluations compared problem by problem: which of them solves which problem.

Owns the pairing of stored generations and the words of the comparison; its statistics are
`statistics.paired`'s.
"""

import pathlib

import numpy as np

from ngrpo_jax.errors import require
from ngrpo_jax.evaluation import generations
from ngrpo_jax.evaluation.generations import Generations, Row
from ngrpo_jax.evaluation.statistics import paired
from ngrpo_jax.runtime import console


def compare(run_a: pathlib.Path, run_b: pathlib.Path) -> str:
    """The paired table of every data set that both runs have, with McNemar's test.

    Args:
      run_a, run_b: each a file of generations, or a workdir, of which the newest step is taken.

    Raises:
      UserError: nothing to read, or nothing in common.
    """
    sets_a, sets_b = _newest(run_a), _newest(run_b)
    if run_a.is_file() and run_b.is_file():  # two files may be of differently named data sets
        pairs = [(a, b) for a in sets_a.values() for b in sets_b.values()]
    else:
        pairs = [(sets_a[name], sets_b[name]) for name in sets_a if name in sets_b]
    require(
        bool(pairs),
        f"{run_a} ({', '.join(sets_a)}) and {run_b} ({', '.join(sets_b)}) have no data set in common.",
    )
    return "\n\n".join(_compare(a, b) for a, b in pairs)


def _newest(run: pathlib.Path) -> dict[str, Generations]:
    """Data set -> generations of its newest step."""
    by_step = sorted(generations.read_all([run]), key=lambda one: one.header["step"])
    return {one.header["set"]: one for one in by_step}


def _compare(a: Generations, b: Generations) -> str:
    correct_a_PG, correct_b_PG, dropped = _paired(a, b)
    samples = correct_a_PG.shape[1]
    table = paired.paired_table(np.any(correct_a_PG, axis=1), np.any(correct_b_PG, axis=1))
    counts = zip(("both", "only A", "only B", "neither"), table, strict=True)
    rows = [(name, count, f"{100 * count / table.total:.1f} %") for name, count in counts]
    p_value = paired.mcnemar(table.only_a, table.only_b)
    gap, low, high = paired.difference_interval(correct_a_PG.mean(axis=1), correct_b_PG.mean(axis=1))
    lines = [
        f"A  {a.path} ({a.label})",
        f"B  {b.path} ({b.label})",
        f"{table.total} problems, {samples} samples each; solved means one of them is right (Pass@{samples})",
        "",
        console.table(rows, ("solved by", "problems", "")),
        "",
        f"McNemar    p = {p_value:.3g} ({table.only_a} against {table.only_b})",
        f"Mean@{samples}    A {100 * correct_a_PG.mean():.2f} %, B {100 * correct_b_PG.mean():.2f} %; "
        f"B - A {100 * gap:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}",
    ]
    if dropped:
        lines.append(f"{dropped} problems are in one of the two only, and are left out")
    return "\n".join(lines)


def _paired(a: Generations, b: Generations) -> tuple[np.ndarray, np.ndarray, int]:
    """(correct_PG of A, of B, problems that only one has): common problems, as many samples of each."""
    correct = [dict(zip(map(_key, one.problems), one.graded().correct_PG, strict=True)) for one in (a, b)]
    common = [key for key in correct[0] if key in correct[1]]
    require(bool(common), f"{a.path} and {b.path} have no finished problem in common.")
    samples = min(a.samples, b.samples)
    first, second = (np.array([of_run[key][:samples] for key in common]) for of_run in correct)
    return first, second, len(correct[0]) + len(correct[1]) - 2 * len(common)


def _key(rows: list[Row]) -> tuple[str, str]:
    return rows[0]["id"], rows[0].get("problem", "")
