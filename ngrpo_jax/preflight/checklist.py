"""A list of checks, each with a verdict and a remark: run in order, merged over processes, printed.

Owns verdicts and their table. Must not know what is checked (checks.py). After a failure the checks that do
not need its result are still run, so that one preflight names all faults.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ngrpo_jax.errors import UserError
from ngrpo_jax.runtime import console

OK, SKIPPED, FAILED = "ok", "not checked", "FAILED"  # from the best verdict to the worst


class Check(NamedTuple):
    """A function of the results of the checks in `needs`; returns (result, remark), or raises to fail."""

    name: str
    function: Callable[..., tuple[Any, str]]
    needs: tuple[str, ...] = ()


class Row(NamedTuple):
    """What became of a check."""

    name: str
    verdict: str
    remark: str


def run_checks(checks: Sequence[Check], given: Mapping[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """Runs the checks in order; (rows, results by name). `given`: what checks may need besides results."""
    rows, results = [], dict(given)
    for name, function, needs in checks:
        missing = [need for need in needs if need not in results]
        if missing:
            rows.append(Row(name, SKIPPED, f"needs {', '.join(missing)}"))
            continue
        try:
            results[name], remark = function(*(results[need] for need in needs))
        except Exception as error:  # of any kind: a check that breaks has failed, and the others still run
            kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
            rows.append(Row(name, FAILED, kind + " ".join(str(error).split())[:400]))
        else:
            rows.append(Row(name, OK, remark))
    return rows, results


def merge(of_processes: Sequence[Sequence[Sequence[str]]]) -> list[Row]:
    """The rows of all processes as one list: each with its worst verdict, and the process that gave it."""
    merged = []
    for rows in zip(*of_processes, strict=True):
        index, (name, verdict, remark) = max(
            enumerate(rows), key=lambda entry: (OK, SKIPPED, FAILED).index(entry[1][1])
        )
        where = f"process {index}: " if len(rows) > 1 and verdict != OK else ""
        merged.append(Row(name, verdict, where + remark))
    return merged


def table(rows: Sequence[Row]) -> str:
    """The rows as text, and a sentence on the whole."""
    failed = sum(row.verdict == FAILED for row in rows)
    end = f"{failed} of {len(rows)} checks failed." if failed else "All checks passed: this run can start."
    return f"{console.table(rows, ('check', 'verdict', ''))}\n\n{end}"
