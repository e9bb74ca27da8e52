r"""The grading command: verdicts of the math reward, each with the rule that decided.

    python -m ngrpo_jax.grade --gold='\frac{1}{2}' --response='so it is \boxed{0.5}'
    python -m ngrpo_jax.grade --file=CASES.jsonl [--json=FILE]

Rows of CASES.jsonl have `gold` and `response`, and may have `id` and `correct`, a verdict to compare with.
--json writes a list of objects: id, gold, equal, answer, way, rule, answer_sort, gold_sort. docs/grading.md
explains them.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ngrpo_jax import files, flags
from ngrpo_jax.errors import UserError, require
from ngrpo_jax.runtime import console
from ngrpo_jax.tasks.grading.extraction import last_boxed
from ngrpo_jax.tasks.grading.forms import UnreadableError
from ngrpo_jax.tasks.grading.reading import read
from ngrpo_jax.tasks.grading.sorts import Answer
from ngrpo_jax.tasks.grading.tokens import tokenize
from ngrpo_jax.tasks.grading.unicode import to_latex
from ngrpo_jax.tasks.rewards import PLAIN, Grader, Verdict

_SHOWN = 40  # characters of an answer in the table


def main(argv: Sequence[str]) -> None:
    """Grades one response, or every row of a file."""
    parser = flags.ArgumentParser(argv[0])
    for name in ("gold", "response", "file", "json"):
        parser.add_argument(f"--{name}")
    given = parser.parse_args(argv[1:])
    one = given.gold is not None and given.response is not None and given.file is None
    require(
        one or (given.file is not None and given.gold is None and given.response is None),
        "give --gold and --response, or --file=CASES.jsonl.",
    )
    rows = [{"gold": given.gold, "response": given.response}] if one else _read(pathlib.Path(given.file))
    with Grader() as grader:
        verdicts = grader.verdicts([row["response"] for row in rows], [row["gold"] for row in rows])
    pairs = enumerate(zip(rows, verdicts, strict=True), 1)
    found = [_record(number, row, verdict) for number, (row, verdict) in pairs]
    if one:
        print("\n".join(f"{name:12} {value}" for name, value in found[0].items() if name != "id"))
    else:
        _print_table(rows, found)
    if given.json is not None:
        files.write_json(pathlib.Path(given.json), found)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for line in files.read_jsonl(path):
        row = line.value if isinstance(line.value, dict) else {}
        texts = isinstance(row.get("gold"), str) and isinstance(row.get("response"), str)
        require(texts, f"{path} line {line.number} has no texts `gold` and `response`; correct it.")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty; give a file with at least one row.")
    return rows


def _record(number: int, row: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """A verdict with its row; plain verdicts get their sorts here, since they need none to be reached."""
    if verdict.way == PLAIN and verdict.answer is not None:
        gold = last_boxed(row["gold"]) or row["gold"]
        verdict = verdict._replace(
            rule="plain reading", answer_sort=_sort(verdict.answer), gold_sort=_sort(gold)
        )
    return {"id": row.get("id", number), "gold": row["gold"], **verdict._asdict()}


def _sort(text: str) -> str:
    try:
        return read(tokenize(to_latex(text))).sort
    except UnreadableError:
        return Answer.sort


def _print_table(rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row, the ways of the verdicts, and which verdicts differ from `correct`."""
    lines = [
        (
            str(record["id"]),
            "equal" if record["equal"] else "not equal",
            _short(record["answer"]),
            _short(record["gold"]),
            record["rule"] or record["way"],
        )
        for record in found
    ]
    print(console.table(lines, ("id", "verdict", "answer", "gold", "rule")))
    ways = Counter(record["way"] for record in found)
    print(", ".join(f"{count} {way}" for way, count in ways.most_common()))
    judged = [(row, record) for row, record in zip(rows, found, strict=True) if "correct" in row]
    if judged:
        wrong = [str(record["id"]) for row, record in judged if bool(row["correct"]) != record["equal"]]
        others = f"; not {', '.join(wrong)}" if wrong else ""
        print(f"{len(judged) - len(wrong)} of {len(judged)} as in `correct`{others}")


def _short(text: str | None) -> str:
    shown = "" if text is None else " ".join(text.split())
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def cli() -> None:
    """The console script ngrpo-grade."""
    flags.run_command(main)


if __name__ == "__main__":
    cli()
