"""The sweep command: a training run for every combination of settings, then a page that compares them.

    python -m ngrpo_jax.sweep --config=configs/NAME.py --workdir=DIR --set seed=0,1,2
        [--set mixing.rate=0,0.1] [--jobs=N] [--task=N] [--config.a.b=value]

Each run has a workdir in DIR, named by its values of the swept settings. Runs come one after the other, or
`--jobs` at a time, each then with its output in DIR/NAME.log. The same command goes on where it was stopped,
and a run that fails does not keep the others from running. `--task` becomes the N-th alone, counted from 0,
for the array of a cluster's scheduler (launch/gpu/sweep.sbatch), and makes no page. Without it, at the end
DIR/compare.html shows the runs that there are, with the seeds of one setting joined. Ctrl-C or SIGTERM is
handed on to the runs, which stop after their step.
"""

from ngrpo_jax.runtime import ending

if __name__ == "__main__":
    ending.listen()  # before the slow imports; also where a script started the sweep with SIGINT ignored

import ast
import itertools
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from ngrpo_jax import flags
from ngrpo_jax.errors import Preempted, UserError, require

_POLL_S = 0.2  # between two looks at the runs that are under way


class Trial(NamedTuple):
    """One run of a sweep: its workdir's name, and the text of each swept setting."""

    name: str
    values: Mapping[str, str]


def main(argv: Sequence[str]) -> None:
    """Checks every combination, runs what is left to do, writes the page."""
    program, *words = argv
    parser = flags.ArgumentParser("python -m ngrpo_jax.sweep")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--task", type=int)
    given, rest = parser.parse_known_args(words)
    require(bool(given.set), "--set is missing; write --set seed=0,1,2.")
    require(given.jobs > 0, f"--jobs={given.jobs} must be above 0.")
    swept = dict(map(parse_set, given.set))
    require(len(swept) == len(given.set), "--set names a setting twice; write all its values in one --set.")
    trials = combinations(swept)
    folder = check(program, rest, trials)
    if given.task is not None:
        last = len(trials) - 1
        require(
            0 <= given.task <= last,
            f"--task={given.task} must be from 0 to {last}: there are {last + 1} runs.",
        )
        _become(command(rest, folder, trials[given.task]), folder)
    statuses = run_all([command(rest, folder, trial) for trial in trials], trials, folder, given.jobs)
    _write_page(folder)
    failed = {trial.name: status for trial, status in zip(trials, statuses, strict=True) if status}
    if failed:
        left = f"; {statuses.count(None)} have not begun" if None in statuses else ""
        print(f"error: these runs did not end well: {', '.join(failed)}{left}.", file=sys.stderr)
        raise SystemExit(next(iter(failed.values())))


def parse_set(text: str) -> tuple[str, list[str]]:
    """NAME=V1,V2 -> (NAME, [V1, V2]); commas within brackets and quotes divide nothing."""
    name, equals, values = text.partition("=")
    require(
        bool(equals and values), f"--set {text!r} has no values; write --set {name or 'NAME'}=VALUE,VALUE."
    )
    # The parser of Python finds where a bracket or a quote ends.
    parts: list[str] = []
    part = ""
    for piece in values.split(","):
        part = f"{part},{piece}" if part else piece
        if not re.search(r"[(\[{'\"]", part) or _is_literal(part):
            parts, part = [*parts, part], ""
    return name.removeprefix("--config."), parts + [part] * bool(part)


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def combinations(swept: Mapping[str, Sequence[str]]) -> list[Trial]:
    """Every combination of the values, the last setting's changing fastest."""
    leaves = [name.rpartition(".")[2] for name in swept]
    short = [leaf if leaves.count(leaf) == 1 else name for leaf, name in zip(leaves, swept, strict=True)]
    trials = []
    for values in itertools.product(*swept.values()):
        pairs = ("=".join(pair) for pair in zip(short, values, strict=True))
        name = re.sub(r"[^\w.=+-]+", "-", "_".join(pairs))
        trials.append(Trial(name, dict(zip(swept, values, strict=True))))
    names = [trial.name for trial in trials]
    require(len(set(names)) == len(names), f"--set has a value twice ({', '.join(names)}).")
    return trials


def check(program: str, rest: Sequence[str], trials: Sequence[Trial]) -> pathlib.Path:
    """The folder of the sweep; UserError where the settings of a run cannot be right."""
    from ngrpo_jax.settings import resolve  # here alone: settings import jax

    folder = ""
    for trial in trials:
        config, options = flags.parse_flags([program, *rest, *_overrides(trial)])
        folder = options["workdir"]
        try:
            resolve(config)
        except UserError as error:
            raise UserError(f"the run {trial.name}: {error}") from error
    return pathlib.Path(folder)


def _overrides(trial: Trial) -> list[str]:
    return [f"--config.{name}={value}" for name, value in trial.values.items()]


def command(rest: Sequence[str], folder: pathlib.Path, trial: Trial) -> list[str]:
    """The training command of a run."""
    kept, skip = [], False
    for word in rest:  # without the sweep's own --workdir
        if skip or word == "--workdir" or word.startswith("--workdir="):
            skip = word == "--workdir" and not skip
            continue
        kept.append(word)
    program = [sys.executable, "-m", "ngrpo_jax.train", f"--workdir={folder / trial.name}"]
    return [*program, *kept, *_overrides(trial)]


def _become(words: list[str], folder: pathlib.Path) -> NoReturn:
    """Goes on as the run itself: signals and the exit status of a cluster's task are the run's own."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    os.execv(words[0], words)


def run_all(
    commands: Sequence[list[str]], trials: Sequence[Trial], folder: pathlib.Path, jobs: int
) -> list[int | None]:
    """Runs the commands, `jobs` at a time: their exit statuses, None for those that were not begun.

    A run that a signal ended keeps the others from beginning.

    Raises:
        Preempted: a signal came, and the runs that were under way have ended by it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    statuses: list[int | None] = [None] * len(commands)
    running: dict[int, subprocess.Popen[bytes]] = {}
    waiting = list(range(len(commands)))

    def how_to_go_on() -> str:
        return _how_to_go_on(trials, statuses, running, folder)

    ending.last_words(how_to_go_on)
    with (
        ending.last_act(lambda: _end(running.values())),
        ending.Deferred(math.inf, kept=lambda: False) as signals,
    ):
        while running or waiting:
            while waiting and len(running) < jobs and not signals.received:
                number = waiting.pop(0)
                print(f"run {number + 1} of {len(commands)}: {trials[number].name}", flush=True)
                log = None if jobs == 1 else folder / f"{trials[number].name}.log"
                running[number] = _start(commands[number], log)
            if signals.received:
                _end(running.values())
                raise Preempted(signals.received, how_to_go_on())
            time.sleep(_POLL_S)
            for number in [number for number, child in running.items() if child.poll() is not None]:
                statuses[number] = status = running.pop(number).returncode
                if status < 0 or status > 128:
                    waiting.clear()
    return statuses


def _start(words: Sequence[str], log: pathlib.Path | None) -> "subprocess.Popen[bytes]":
    """Starts a run, its output in `log`.

    It has a process group of its own: Ctrl-C in a terminal reaches the sweep alone, which hands it on once. A
    run takes a second signal for the wish to end within its step.
    """
    if log is None:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, process_group=0)
    with log.open("a", encoding="utf-8") as output:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )


def _end(children: Iterable["subprocess.Popen[bytes]"]) -> None:
    """Tells the runs to stop after their step, and waits until they have."""
    under_way = list(children)
    for child in under_way:
        child.send_signal(signal.SIGTERM)
    for child in under_way:
        child.wait()


def _how_to_go_on(
    trials: Sequence[Trial], statuses: Sequence[int | None], begun: Iterable[int], folder: pathlib.Path
) -> str:
    """What a stopped sweep leaves: the runs under way with their steps, the finished ones, the rest."""
    under_way = [f"{trials[number].name} has {_steps_done(folder / trials[number].name)}" for number in begun]
    rest = statuses.count(None) - len(under_way)
    parts = [
        *under_way,
        f"{len(trials) - statuses.count(None)} of {len(trials)} runs have ended",
        f"{rest} {'has' if rest == 1 else 'have'} not begun",
    ]
    return f"{', '.join(parts)}; the same command goes on."


def _steps_done(workdir: pathlib.Path) -> str:
    """The steps of a run's newest checkpoint, from which it goes on."""
    found = (int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())
    steps = max(found, default=0)
    return f"{steps} step{'' if steps == 1 else 's'}" if steps else "no step yet"


def _write_page(folder: pathlib.Path) -> None:
    """DIR/compare.html of the runs that have finished a step."""
    from ngrpo_jax.report import __main__ as report

    found = sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl") if path.stat().st_size)
    if len(found) > 1:
        report.main(["report", "compare", *found, f"--out={folder / 'compare.html'}"])


def cli() -> None:
    """The console script ngrpo-sweep."""
    ending.listen()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that is closed; nohup ignores it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    flags.run_command(main)


if __name__ == "__main__":
    cli()
