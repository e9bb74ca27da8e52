"""The study's command line.

    python -m benchmarks.study run [--task=NAME,…] [--arm=NAME,…] [--seeds=0:24] [--limit-minutes=N]
    python -m benchmarks.study status      what ran, what is missing, seconds a run, hours left
    python -m benchmarks.study cases --task=NAME      single responses that one mixed step turned, of seed 0
    python -m benchmarks.study report      writes docs/study.md and its plots from the records

`run` makes the runs that have no record yet, seed by seed: all arms of all tasks of one seed, then the next
seed. Without --task and --arm it makes those that plan.md counts. A run that was interrupted is made anew.

  --work=DIR             base models and compiled programs (runs/study)
  --results=DIR          where records are (benchmarks/study/results)
  --set=NAME=VALUE       changes a setting of all runs, for pilots; only with another --results; may be
  repeated --budget=TOKENS        generated training tokens of a run, for pilots; as above --model=DIR
  the model of the task smollm2
"""

import argparse
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from benchmarks.study import plan, store, trial
from benchmarks.study.arms import ARMS
from benchmarks.study.tasks import TASKS
from ngrpo_jax.errors import require
from ngrpo_jax.flags import run_command
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import Settings


def main(argv: Sequence[str]) -> None:
    """Parses flags and does what they ask."""
    parser = argparse.ArgumentParser("benchmarks.study", allow_abbrev=False)
    parser.add_argument("command", choices=("run", "status", "cases", "report"))
    for name in ("task", "arm", "seeds", "model"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"))
    parser.add_argument("--budget", type=int)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/study"))
    parser.add_argument("--results", type=pathlib.Path, default=store.RESULTS)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args(argv[1:])
    if options.command == "run":
        run(options)
    elif options.command == "cases":
        from benchmarks.study import cases

        cases.write(prepared(options), options.task, 0, options.results)
    elif options.command == "status":
        status(options.results)
    else:
        from benchmarks.study import report

        report.write(options.results)


def run(options: argparse.Namespace) -> None:
    """Makes the wanted runs that have no record."""
    counted = options.results == store.RESULTS
    require(
        not counted or not (options.set or options.budget),
        "--set and --budget change what is run; give --results=DIR too.",
    )
    wanted, study = selected(options), prepared(options)
    end = time.monotonic() + 60 * options.limit_minutes
    for name, arm, seed in store.missing(wanted, options.results):
        if time.monotonic() > end:
            break
        record = study.run(name, arm, seed)
        store.append(record, options.results)
        print(one_line(record), flush=True)


def prepared(options: argparse.Namespace) -> trial.Study:
    """What makes runs, with the settings that the flags change."""
    kinds = Settings.kinds()
    pairs = [text.partition("=")[::2] for text in options.set]
    changes = {name: kinds[name].read(name, value) for name, value in pairs}
    work = options.work.absolute()
    jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return trial.Study(work, mesh.make_mesh(1, 1, 1), changes, options.model, options.budget)


def selected(options: argparse.Namespace) -> list[store.Key]:
    """The runs that the flags name, or those of the plan, seed by seed."""
    if options.task is None and options.arm is None:
        return [key for key in plan.runs() if options.seeds is None or key[2] in seeds(options.seeds)]
    names = (options.task or "synonyms,countdown").split(",")
    arms = (options.arm or ",".join(plan.CORE)).split(",")
    unknown = sorted({*names} - {*TASKS} | {*arms} - {*ARMS})
    require(
        not unknown,
        f"no task or arm {', '.join(unknown)}; tasks: {', '.join(TASKS)}; arms: {', '.join(ARMS)}.",
    )
    return [(n, a, s) for s, n, a in itertools.product(seeds(options.seeds or "0:1"), names, arms)]


def seeds(text: str) -> range:
    """ "0:24" as 0..23, "5" as 5 alone."""
    first, colon, end = text.partition(":")
    return range(int(first), int(end) if colon else int(first) + 1)


def one_line(record: store.Record) -> str:
    """A run that has ended, in short."""
    from benchmarks.study.analysis import mean, pass_at

    counts = trial.unpacked(record["correct"])
    return (
        f"{record['task']} {record['arm']} {record['seed']}: Mean {mean(counts, record['samples']):.3f} "
        f"Pass@32 {pass_at(32, counts, record['samples']).mean():.3f} paths "
        f"{trial.unpacked(record['correct_paths']).mean():.2f}/{trial.unpacked(record['paths']).mean():.1f} "
        f"entropy {record['entropy']:.3f} train {record['train']} {record['seconds']} s"
    )


def status(folder: pathlib.Path) -> None:
    """Prints which runs are there, which are missing, and how long the rest takes."""
    records = {store.key(record): record for record in store.read(folder)}
    left = 0.0
    for (name, arm), keys in itertools.groupby(sorted(plan.runs()), key=lambda key: key[:2]):
        wanted = list(keys)
        there = [records[key] for key in wanted if key in records]
        seconds = sorted(record["seconds"] for record in there)
        typical = seconds[len(seconds) // 2] if seconds else plan.SECONDS
        left += typical * (len(wanted) - len(there))
        print(f"{name:15} {arm:20} {len(there):3} of {len(wanted):3} runs, {typical:5.1f} s a run")
    print(f"{left / 3600:.2f} hours left")


if __name__ == "__main__":
    run_command(main, [sys.argv[0], *sys.argv[1:]])
