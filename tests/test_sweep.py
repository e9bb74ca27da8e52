"""Sweeps: every combination once, each in a workdir of its own, checked before the first run starts."""

import json
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from ngrpo_jax import flags, sweep

ROOT = pathlib.Path(__file__).parent.parent


def test_values_are_divided_by_commas_outside_of_brackets():
    assert sweep.parse_set("seed=0,1,2") == ("seed", ["0", "1", "2"])
    assert sweep.parse_set("eval.pass_k=(2,4),(8,)") == ("eval.pass_k", ["(2,4)", "(8,)"])
    assert sweep.parse_set("--config.optimizer.learning_rate=1e-6,3e-6")[0] == "optimizer.learning_rate"


def test_every_combination_has_a_workdir_named_by_its_settings():
    trials = sweep.combinations({"mixing.rate": ["0", "0.1"], "data.train": ["a/b c", "d"]})
    assert [trial.name for trial in trials] == [
        "rate=0_train=a-b-c",
        "rate=0_train=d",
        "rate=0.1_train=a-b-c",
        "rate=0.1_train=d",
    ]
    assert dict(trials[2].values) == {"mixing.rate": "0.1", "data.train": "a/b c"}
    both = sweep.combinations({"train.steps": ["1"], "warm_start.steps": ["2"]})
    assert both[0].name == "train.steps=1_warm_start.steps=2"


def _sweep(*words):
    flags.run_command(sweep.main, ["sweep", "--config=tiny", *words])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--set is missing"),
        (["--set", "seed"], "has no values"),
        (["--set", "seed=0,0"], "has a value twice"),
        (["--set", "sede=0"], "did you mean --config.seed"),
        (["--set", "rollout.group=8,1"], "the run group=1|rollout.group is 1"),
        (["--set", "seed=0,1", "--task=2"], "must be from 0 to 1"),
    ],
)
def test_what_cannot_be_right_is_refused_before_any_run(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as refusal:
        _sweep(f"--workdir={tmp_path}", *words)
    error = capsys.readouterr().err
    assert refusal.value.code == 2 and error.count("\n") == 1
    assert any(part in error for part in sentence.split("|"))


class _Runs:
    """Stands for the training processes: each writes two steps; those of `failing` end with a status."""

    def __init__(self, **failing):
        self.failing, self.commands = failing, []

    def start(self, command, **_):
        assert command[:3] == [sys.executable, "-m", "ngrpo_jax.train"]
        self.commands.append(command)
        (workdir,) = (word.removeprefix("--workdir=") for word in command if word.startswith("--workdir="))
        folder = pathlib.Path(workdir)
        folder.mkdir(exist_ok=True)
        rows = [{"step": step, "reward/mean": 0.5} for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seed = folder.name.rpartition("seed=")[2]
        (folder / "config.json").write_text(json.dumps({"seed": int(seed)}))
        status = self.failing.get(f"seed{seed}", 0)
        return types.SimpleNamespace(returncode=status, poll=lambda: status)


def test_runs_come_in_order_and_are_compared(tmp_path, monkeypatch, capsys):
    runs = _Runs()
    monkeypatch.setattr(sweep.subprocess, "Popen", runs.start)
    _sweep("--workdir", str(tmp_path), "--set", "seed=0,1", "--config.train.steps=4")
    assert [command[3:] for command in runs.commands] == [
        [
            f"--workdir={tmp_path}/seed={seed}",
            "--config=tiny",
            "--config.train.steps=4",
            f"--config.seed={seed}",
        ]
        for seed in (0, 1)
    ]
    assert "2 runs compared" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "run 2 of 2: seed=1" in capsys.readouterr().out


def test_a_failed_run_does_not_keep_the_others_from_running_but_a_signal_does(tmp_path, monkeypatch, capsys):
    for status, started in ((2, 3), (143, 1)):
        runs = _Runs(seed0=status)
        monkeypatch.setattr(sweep.subprocess, "Popen", runs.start)
        with pytest.raises(SystemExit) as ended:
            _sweep(f"--workdir={tmp_path / str(status)}", "--set", "seed=0,1,2")
        assert ended.value.code == status and len(runs.commands) == started
        assert "seed=0" in capsys.readouterr().err


def test_one_task_of_an_array_runs_alone(tmp_path, monkeypatch):
    class Replaced(Exception):
        """The process is another program from here on."""

    def execute(path, words):
        raise Replaced(path, words)

    monkeypatch.setattr(sweep.os, "execv", execute)
    with pytest.raises(Replaced) as replaced:
        sweep.main(["sweep", "--config=tiny", f"--workdir={tmp_path}", "--set", "seed=0,1,2", "--task=1"])
    path, words = replaced.value.args
    assert path == sys.executable and words[1:3] == ["-m", "ngrpo_jax.train"]
    assert words[-1] == "--config.seed=1" and f"--workdir={tmp_path}/seed=1" in words


# A sweep over sleeping processes: each counts the signals that it hears, and ends some time after the first.
SIGNALLED = """
import pathlib, sys
from ngrpo_jax import flags, sweep
CHILD = (
    "import pathlib, signal, sys, time; log = pathlib.Path(sys.argv[1]) / 'heard'; heard = []; "
    "signal.signal(signal.SIGTERM, lambda number, _: heard.append(number)); log.write_text('ready')\\n"
    "while not heard: time.sleep(0.05)\\n"
    "time.sleep(0.3); log.write_text(str(heard)); sys.exit(143)"
)
folder = pathlib.Path(sys.argv[1])
trials = sweep.combinations({"seed": ["0", "1", "2"]})
for trial in trials:
    (folder / trial.name / "checkpoints").mkdir(parents=True)
(folder / "seed=0" / "checkpoints" / "7").mkdir()
words = [[sys.executable, "-c", CHILD, str(folder / trial.name)] for trial in trials]
sweep.main = lambda argv: sweep.run_all(words, trials, folder, jobs=2)
sweep.cli()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_runs_too_and_the_sweep_says_how_far_they_are(tmp_path, number):
    # SIGINT ignored, as in the background of a script; SIGHUP not, though nohup may have started the tests.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", SIGNALLED, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGHUP, before[1])
    heard = [tmp_path / f"seed={seed}" / "heard" for seed in (0, 1)]
    try:
        for _ in range(200):
            if all(path.exists() and path.read_text() for path in heard):
                break
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    ended = signal.SIGTERM if number == signal.SIGHUP else number
    assert (process.returncode, said) == (
        128 + ended,
        f"stopped by {ended.name}; seed=0 has 7 steps, seed=1 has no step yet, 0 of 3 runs have ended, "
        "1 has not begun; the same command goes on.\n",
    )
    assert [path.read_text() for path in heard] == [str([int(signal.SIGTERM)])] * 2
