"""What a run's evaluations say: the verdict in a sentence, and which held-out problems are solved.

Owns these words. A run of an earlier version has no evaluations.jsonl: its summary and metrics say less.
"""

from typing import Any

import numpy as np

from ngrpo_jax.evaluation.statistics import paired, passk
from ngrpo_jax.report.numbers import number, percent, points
from ngrpo_jax.report.workdir import Row, Run


def ends(run: Run, key: str) -> tuple[float, float] | None:
    """A held-out metric before training and at the last evaluation; None where either is unknown."""
    known = [row for row in run.evaluations if key in row]
    if len(known) > 1:
        return known[0][key], known[-1][key]
    before, after = run.summary.get(f"{key}_before"), run.summary.get(f"{key}_after")
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return None
    return before, after


def verdict(run: Run) -> str:
    """What became of the run, in a sentence or two; empty where it was evaluated less than twice."""
    mean = ends(run, "mean_at_n")
    if mean is None:
        return ""
    before, after = mean
    last = max(row["step"] for row in run.rows)
    interval = change_interval(run)
    change = f"{points(after - before)} points"
    if interval is not None:
        low, high = interval
        change += f", 95 % interval {points(low)} to {points(high)}"
    if interval is not None and low <= 0 <= high:
        found = f"No change beyond chance: held-out accuracy was {percent(before)} before training and is"
    else:
        verb = "rose" if after > before else "fell" if after < before else "stayed"
        found = f"Held-out accuracy {verb} from {percent(before)} to"
    return f"{found} {percent(after)} after {number(last)} steps ({change}){_when(run)}.{_best(run)}"


def change_interval(run: Run, k: int | None = None) -> tuple[float, float] | None:
    """95 % interval of the change of Mean@n, or of Pass@k, by bootstrap over problems.

    None where the counts of the problems are unknown.
    """
    if len(run.evaluations) < 2:
        return None
    first, last = run.evaluations[0], run.evaluations[-1]
    before, after = (row.get("correct") or {} for row in (first, last))
    if not before or before.keys() != after.keys():
        return None
    n = first["samples"]
    shares = [c / n if k is None else passk.pass_at_k(n, c, k) for c in range(n + 1)]
    values = (np.array([shares[counts[key]] for key in before]) for counts in (before, after))
    return paired.difference_interval(*values)[1:]


def _when(run: Run) -> str:
    """The evaluation at which most of the gain was there."""
    rows = run.evaluations
    if len(rows) < 3 or rows[-1]["mean_at_n"] <= rows[0]["mean_at_n"]:
        return ""
    half = (rows[0]["mean_at_n"] + rows[-1]["mean_at_n"]) / 2
    row = next(row for row in rows if row["mean_at_n"] >= half)
    return f", most of it by step {number(row['step'])} ({percent(row['mean_at_n'])})"


def _best(run: Run) -> str:
    step, value = run.summary.get("best_step"), run.summary.get("best_value")
    if step is None:
        return ""
    if not isinstance(value, int | float):
        return f" The best checkpoint is that of step {number(step)}."
    start = (ends(run, run.summary.get("best_metric", "mean_at_n")) or (value,))[0]
    below = f"; below the starting model's {percent(start)}" if value < start else ""
    return f" The best checkpoint is that of step {number(step)} ({percent(value)} held out){below}."


def problems(run: Run) -> dict[str, Any] | None:
    """Each held-out problem: correct responses before, at best and at the last evaluation. None: unknown.

    Those with the fewest at last come first.

    `never` counts the problems that no evaluation solved.
    """
    rows = [row for row in run.evaluations if row.get("correct")]
    if not rows:
        return None
    texts: dict[str, str] = next((row["problems"] for row in rows if row.get("problems")), {})
    of_problem = {key: [row["correct"].get(key) for row in rows] for key in rows[-1]["correct"]}
    shown = [_problem(key, texts.get(key, ""), counts) for key, counts in of_problem.items()]
    shown.sort(key=lambda row: (row["last"], row["best"], row["first"]))  # what is not solved comes first
    return {
        "rows": shown,
        "samples": rows[-1]["samples"],
        "evaluations": len(rows),
        "counts": {kind: sum(row["kind"] == kind for row in shown) for kind in ("never", "learnt", "lost")},
    }


def _problem(key: str, text: str, counts: list[int | None]) -> Row:
    """A problem's row; `kind` is "never", "learnt" (not at first, but at last), "lost" or ""."""
    known = [count for count in counts if count is not None]
    kind = ""
    if not any(known):
        kind = "never"
    elif known[0] == 0 and known[-1] > 0:
        kind = "learnt"
    elif known[0] > 0 and known[-1] == 0:
        kind = "lost"
    return {"id": key, "text": text, "first": known[0], "best": max(known), "last": known[-1], "kind": kind}
