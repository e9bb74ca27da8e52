"""Which ways of mixing does the small model learn with? One run of configs/tiny.py each, from one start.

    python benchmarks/strategies.py --out=runs/strategies [--steps=36] [--only=cosine,stht] [--json=FILE]

The first run makes the warm start and the others begin from its model, so that they differ in the mixing
alone and have the same metrics before training. Evaluation is without mixing. A run takes two to four minutes
on two cores. A finished run is only read: give the same command again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measure
from ngrpo_jax.runtime.metrics import read_rows

ROOT = pathlib.Path(__file__).parent.parent
GOAL = 0.15  # rise of held-out Mean@8 by which a strategy counts as learning


class Strategy(NamedTuple):
    """What the table calls it, what it sets apart from configs/tiny.py, and whether it has to learn."""

    title: str
    mixing: Mapping[str, Any]
    learns: bool = True


STRATEGIES = {
    "cosine": Strategy("neighbours, cosine, ρ = 0.1", {}),
    "l2": Strategy("neighbours, L2, ρ = 0.1", {"metric": "l2"}),
    "l1": Strategy("neighbours, L1, ρ = 0.1", {"metric": "l1"}),
    "dot": Strategy("neighbours, dot, ρ = 0.1", {"metric": "dot"}),
    "stht": Strategy("noise (STHT), σ = 0.33", {"strategy": "noise", "rate": 1.0}),
    "gumbel": Strategy("Gumbel, k = 3", {"strategy": "gumbel", "rate": 1.0}),
    "grpo": Strategy("none (GRPO)", {"rate": 0.0}),
    "rate1": Strategy("neighbours, cosine, ρ = 1", {"rate": 1.0}, learns=False),
    "soft": Strategy("Soft Thinking, k = 3", {"strategy": "soft", "rate": 1.0}, learns=False),
}
HEADERS = (
    *("strategy", "Mean@8 before", "after", "rise", "groups without variance", "mixed tokens"),
    *("cosine to anchor", "training, s", f"rise ≥ {GOAL}"),
)


def main() -> None:
    """Runs what is not there yet, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(STRATEGIES))
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    unknown = [name for name in given.only if name not in STRATEGIES]
    if unknown:
        parser.error(f"--only: there is no {unknown[0]}; there are {', '.join(STRATEGIES)}")
    rows = [_row(STRATEGIES[name], _trained(given.out, name, given.steps)) for name in given.only]
    report = measure.Report("Learning by each way of mixing")
    report.table(
        f"configs/tiny.py, {given.steps} steps, one seed",
        HEADERS,
        rows,
        "All steps until `</think>` are mixed in STHT, Gumbel, Soft Thinking and at ρ = 1.",
    )
    report.save(given.json)


def _trained(out: pathlib.Path, name: str, steps: int) -> pathlib.Path:
    """The workdir of a finished run of the strategy; what it prints goes to OUT/NAME.log."""
    workdir, start = (out / name).resolve(), _start(out)
    settings = {f"mixing.{leaf}": value for leaf, value in STRATEGIES[name].mixing.items()}
    settings |= {"train.steps": steps, "eval.every": None, "checkpoint.every": steps}
    if start is not None and start.parent != workdir:
        settings["model.path"] = start
    flags = [f"--config.{leaf}={value}" for leaf, value in settings.items()]
    command = ["-m", "ngrpo_jax.train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags]
    out.mkdir(parents=True, exist_ok=True)
    measure.say(f"{name}: python {' '.join(command)}")
    with (out / f"{name}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}; {log.name} says why")
    found = _summary(workdir)["steps"]
    if found != steps:
        raise SystemExit(f"{workdir} holds a run of {found} steps, not {steps}; name another --out")
    return workdir


def _start(out: pathlib.Path) -> pathlib.Path | None:
    """The model that an earlier run in `out` has made for itself, resolved; None before there is one."""
    made = sorted(path for path in out.glob("*/warm_start") if path.is_dir())
    return made[0].resolve() if made else None


def _row(strategy: Strategy, workdir: pathlib.Path) -> tuple[Any, ...]:
    summary = _summary(workdir)
    before, after = summary["mean_at_n_before"], summary["mean_at_n_after"]
    rise = after - before
    seconds = sum(row["time/step"] for row in read_rows(workdir / "metrics.jsonl"))
    verdict = ("yes" if rise >= GOAL else "no") if strategy.learns else None
    return (
        *(strategy.title, before, after, f"{rise:+.3f}", _percent(summary["zero_variance"])),
        *(_percent(summary["mixed_fraction"]), summary["mix_cosine_mean"], seconds, verdict),
    )


def _summary(workdir: pathlib.Path) -> dict[str, Any]:
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
