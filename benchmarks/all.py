"""Every benchmark against its goal: runs them one after the other, and makes one table of all.

    python benchmarks/all.py --folder=DIR [--model=DIR] [--peer-python=PATH] [--vllm-python=PATH]
        [--adapters-python=PATH] [--data=math500.jsonl] [--only=NAME,NAME] [--write]

Each benchmark's figures go to FOLDER/NAME.json; one that is there already is not run again, so that an
interrupted command goes on. Benchmarks that need a path which was not given are left out and named. --write
puts the table into docs/performance.md, between its markers. All of them take some two hours on two cores,
which nothing else should use meanwhile.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- goals: python benchmarks/all.py --write -->", "<!-- end of goals -->"


class Case(NamedTuple):
    """A benchmark: its script with its words, and the options of this command that become flags of it."""

    words: str
    options: tuple[str, ...] = ()


# The flags of a benchmark have the names of this command's options.
CASES = {
    "rollout": Case("rollout.py --equal --tail", ("vllm-python", "peer-python")),
    "rollout-smollm2": Case("rollout.py --equal --tail", ("model", "vllm-python", "peer-python")),
    "mixing": Case("rollout.py --mixing", ("model",)),
    "simulation": Case("simulation.py"),
    "update": Case("learner.py --update --unroll --rows=2 --rounds=15", ("peer-python",)),
    "step": Case("learner.py --step --unroll --rows=2 --rounds=9", ("peer-python",)),
    "step-smollm2": Case("learner.py --step", ("model", "peer-python")),
    "adapters": Case("adapters.py --rank=16", ("model",)),
    "adapters-step": Case("adapters.py --rank=16 --step --rounds=3", ("model", "adapters-python")),
    "table": Case("neighbors.py", ("model", "peer-python")),
    "refresh": Case("neighbors.py --refresh --rates=1e-6", ("model",)),
    "memory": Case("memory.py"),
    "memory-rollout": Case("rollout.py --memory"),
    "grading": Case("grading.py", ("data",)),
}
AFTER_DASHES = {"adapters": "-- --rows=1", "adapters-step": "-- --rows=1"}  # for the script in a script
FLAGS = {"adapters-python": "peer-python"}


class Goal(NamedTuple):
    """A figure of a benchmark: where it is, and what it should be.

    Attributes:
      table: of the case's tables, the one whose title begins so.
      row: the row whose cells begin so, joined; "" for every row, of which the worst counts.
      column: its header.
      least, most: bounds; None where there is none.
    """

    what: str
    case: str
    table: str
    row: str
    column: str
    least: float | None = None
    most: float | None = None


ENGINE, LEARNER = "this engine / it", "it / this learner"
EQUAL, TAIL, TRL = "Equal lengths", "Long tail", "TRL GRPOTrainer"
HF, HALVED, HELD = "Hugging Face generate", "slots that fit", "the same, a step reads"
GOALS = (
    Goal("decoding against vLLM, small Qwen2", "rollout", EQUAL, "vLLM", ENGINE, 1.4),
    Goal("long tail against vLLM, small Qwen2", "rollout", TAIL, "vLLM", ENGINE, 1.2),
    Goal("decoding against vLLM, SmolLM2", "rollout-smollm2", EQUAL, "vLLM", ENGINE, 1.0),
    Goal("long tail against vLLM, SmolLM2", "rollout-smollm2", TAIL, "vLLM", ENGINE, 1.0),
    Goal("decoding against Hugging Face, small Qwen2", "rollout", EQUAL, HF, ENGINE, 2.0),
    Goal("long tail against Hugging Face, small Qwen2", "rollout", TAIL, HF, ENGINE, 4.0),
    Goal("decoding against Hugging Face, SmolLM2", "rollout-smollm2", EQUAL, HF, ENGINE, 1.7),
    Goal(
        "decoding, share of a step's matrix products, SmolLM2",
        "rollout-smollm2",
        EQUAL,
        "the step's matrix products",
        ENGINE,
        0.7,
    ),
    Goal(
        "a decode step mixed at ρ = 0.1 over one unmixed",
        "mixing",
        "Mixing",
        "rate 0.1",
        "time / off",
        None,
        1.01,
    ),
    Goal("the same at ρ = 1", "mixing", "Mixing", "rate 1", "time / off", None, 1.02),
    *(
        Goal(
            f"simulated rollout, {name}, {what}",
            "simulation",
            "64 prompts",
            f"{name} {row}",
            "to the first",
            least,
        )
        for name, least_halved, least_held in (
            ("8 × v5e", 2.2, 2.4),
            ("8 × v6e", 2.2, 2.4),
            ("1 × H100", 2.0, 2.7),
        )
        for what, row, least in (
            ("slots that fit, halved", HALVED, least_halved),
            ("with the kernel", HELD, least_held),
        )
    ),
    Goal("update against TRL, small Qwen2", "update", "Update alone", TRL, LEARNER, 2.0),
    Goal("whole step against TRL, small Qwen2", "step", "Whole step", TRL, LEARNER, 2.0),
    Goal("whole step against TRL, SmolLM2", "step-smollm2", "Whole step", TRL, LEARNER, 2.3),
    Goal(
        "update with adapters over all weights, SmolLM2: time",
        "adapters",
        "Update alone",
        "all weights",
        "time, adapters / it",
        None,
        0.75,
    ),
    Goal(
        "the same: peak memory",
        "adapters",
        "Update alone",
        "all weights",
        "memory, adapters / it",
        None,
        0.55,
    ),
    Goal(
        "step with adapters over TRL with PEFT, SmolLM2",
        "adapters-step",
        "Whole step",
        "TRL with PEFT",
        "time, adapters / it",
        None,
        0.5,
    ),
    Goal("neighbour table against faiss, SmolLM2", "table", "Exact table", "faiss", "it / this table", 1.0),
    Goal(
        "certified refresh at a learning rate of 10⁻⁶ over a full build",
        "refresh",
        "Refresh",
        "refresh / full build",
        "seen",
        None,
        0.05,
    ),
    Goal(
        "memory of a training step, estimate over measured, worst",
        "memory",
        "Memory",
        "",
        "calculated / measured",
        0.85,
        1.15,
    ),
    Goal(
        "memory of 8 slots × 8192 tokens, estimate over measured",
        "memory-rollout",
        "Memory",
        "measured",
        "calculation / this",
        0.85,
        1.15,
    ),
    Goal("plain numbers graded a second", "grading", "Verdicts", "plain numbers", "verdicts/s", 10_000),
    Goal(
        "MATH answers graded a second against another problem's",
        "grading",
        "Verdicts",
        "MATH answers against another",
        "verdicts/s",
        150,
    ),
)


def main() -> None:
    """Runs what is missing, then prints the table."""
    given = _arguments()
    given.folder.mkdir(parents=True, exist_ok=True)
    names = given.only.split(",") if given.only else list(CASES)
    for number, name in enumerate(names, 1):
        _run(name, given, f"{number} of {len(names)}")
    text = table({path.stem: json.loads(path.read_text("utf-8")) for path in given.folder.glob("*.json")})
    print(text)
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _run(name: str, given: argparse.Namespace, place: str) -> None:
    """Runs a benchmark unless its figures are there, or what it needs is missing."""
    case, target = CASES[name], given.folder / f"{name}.json"
    if target.exists():
        return
    values = {option: getattr(given, option.replace("-", "_")) for option in case.options}
    missing = [f"--{option}" for option, value in values.items() if value is None]
    if missing:
        print(
            f"{place}: {name} is left out, for want of {' and '.join(missing)}.", file=sys.stderr, flush=True
        )
        return
    script, *words = case.words.split()
    flags = [f"--{FLAGS.get(option, option)}={value}" for option, value in values.items()]
    more = AFTER_DASHES.get(name, "").split()
    command = [sys.executable, str(HERE / script), *words, *flags, f"--json={target}", *more]
    print(f"{place}: {name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    subprocess.run(command, check=True)
    print(f"{place}: {name} took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def table(reports: dict[str, dict[str, Any]]) -> str:
    """One Markdown table of all goals, from the figures of each case by name, and the machines below it."""
    lines = ["| | goal | seen |", "|---|---|---|"]
    for goal in GOALS:
        seen = None if goal.case not in reports else find(reports[goal.case], goal)
        wanted = " … ".join(
            f"{sign} {bound:,}" for sign, bound in (("≥", goal.least), ("≤", goal.most)) if bound is not None
        )
        lines.append(f"| {goal.what} | {wanted} | {'not measured' if seen is None else _said(seen, goal)} |")
    machines = sorted({report["machine"] for report in reports.values()})
    return "\n".join([*lines, "", *machines])


def find(report: dict[str, Any], goal: Goal) -> Any | None:
    """The figure of a goal: a number, or an interval of three; None where it is not there."""
    found = []
    for one in report["tables"]:
        if not one["title"].startswith(goal.table) or goal.column not in one["headers"]:
            continue
        column = one["headers"].index(goal.column)
        for row in one["rows"]:
            name = " ".join(cell for cell in row[:2] if isinstance(cell, str))
            if name.startswith(goal.row) and row[column] is not None:
                found.append(row[column])
    return max(found, key=lambda value: _distance(value, goal), default=None)


def _median(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def _distance(value: Any, goal: Goal) -> float:
    """How far beyond the nearer bound a figure is; below 0 where the goal is met."""
    median = _median(value)
    below = -float("inf") if goal.least is None else goal.least - median
    above = -float("inf") if goal.most is None else median - goal.most
    return max(below, above)


def _said(value: Any, goal: Goal) -> str:
    said = f"{_median(value):,.4g}"
    if isinstance(value, dict) and value["low"] != value["high"]:
        said += f" ({value['low']:,.4g} … {value['high']:,.4g})"
    return said if _distance(value, goal) <= 0 else f"**{said}**, missed"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="where the figures go")
    for name, what in (
        ("model", "a Hugging Face directory of SmolLM2-135M"),
        ("peer-python", "the python of the environment with torch, transformers, TRL, faiss"),
        ("vllm-python", "the python of that with vLLM for CPU"),
        ("adapters-python", "the python of that with TRL and PEFT"),
        ("data", "MATH-500 as JSONL"),
        ("only", f"names, joined by commas, of {', '.join(CASES)}"),
    ):
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    given = parser.parse_args()
    unknown = sorted(set((given.only or "").split(",")) - {""} - set(CASES))
    if unknown:
        parser.error(f"--only: no benchmark is called {', '.join(unknown)}; there are {', '.join(CASES)}")
    return given


if __name__ == "__main__":
    main()
