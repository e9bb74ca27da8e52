"""Runs of several real processes on this machine: the metrics of one process, and the end of all with one."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from ngrpo_jax.runtime import distributed
from ngrpo_jax.runtime.metrics import VARYING_GROUPS, read_rows

ROOT = pathlib.Path(__file__).parent.parent
LOCAL = ROOT / "launch" / "gpu" / "local.sh"
SMALL = {
    "warm_start.num_layers": 2,
    "warm_start.hidden_size": 32,
    "warm_start.intermediate_size": 48,
    "warm_start.steps": 30,
    "warm_start.batch": 8,
    "data.train_size": 40,
    "rollout.prompts": 8,
    "rollout.group": 4,
    "rollout.max_new_tokens": 12,
    "rollout.slots": 32,
    "train.mini_batch_prompts": 4,
    "train.row_tokens": 64,
    "checkpoint.every": 2,
    "eval.every": 2,
    "eval.problems": 5,
    "eval.samples": 2,
    "eval.pass_k": 2,
    "eval.max_new_tokens": 12,
    "mixing.rate": 0.5,
    "objective.aggregate": "token",
    "reward.kind": "own_reward:odd_length",
}


def _environment(**extra):
    """Of a training process: one CPU device, and nothing that another launcher left behind."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "NGRPO_", "XLA_"))}
    cache = {k: v for k, v in os.environ.items() if "CACHE" in k or "CACHING" in k}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return (
        kept
        | cache
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "0"),
            "XLA_FLAGS": flags,
            "NGRPO_PYTHON": sys.executable,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "PYTHONUNBUFFERED": "1",
            **extra,
        }
    )


def _overrides(processes, settings):
    each = {"mesh.data": processes, "train.rows_per_device": 8 // processes} | settings
    return [f"--config.{name}={value}" for name, value in each.items()]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(workdir, processes, settings):
    """launch/gpu/local.sh with so many processes; returns the running script."""
    words = [str(LOCAL), "--config=configs/tiny.py", f"--workdir={workdir}", f"--processes={processes}"]
    words += [f"--port={_free_port()}", "--", *_overrides(processes, settings)]
    return subprocess.Popen(
        ["bash", *words], env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _train(workdir, processes, settings):
    script = _start(workdir, processes, settings)
    output = script.communicate(timeout=1500)[0]
    assert script.returncode == 0, output + _logs(workdir)
    return read_rows(workdir / "metrics.jsonl")


def _logs(workdir):
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(workdir.glob("logs/*.log")))


def _copy_of_start(start, workdir):
    """A workdir that begins from the same warm start."""
    workdir.mkdir()
    shutil.copytree(start / "warm_start", workdir / "warm_start")
    shutil.copy(start / "warm_start.json", workdir)
    return workdir


# Of a single token, whose log-probability float32 does not give to 1e-5: with the weights of tiny's warm
# start moved by 2^-24 of themselves it moves by 2e-7 in the mean, by 4e-6 at one token in a hundred, by 5e-5
# at the most sensitive of ten thousand; with 16 rows computed at once in place of 32, by 1.7e-5 there.
OF_ONE_TOKEN = ("gap/max", "learner/ratio_max", "learner/ratio_min")


def _assert_same_figures(rows, expected):
    """All to 1e-5 but times, the fill of rows, which depends on who packs what, and the cost of the neighbour
    table, for rounding tips single rows over their bounds; those of one token to 1e-4.
    """
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith((*VARYING_GROUPS, "table/")) and name != "rows/fill":
                near = 1e-4 if name in OF_ONE_TOKEN else 1e-5
                assert row[name] == pytest.approx(value, rel=near, abs=near), (row["step"], name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A finished run of one process, 4 steps."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    _train(workdir, 1, SMALL | {"train.steps": 4})
    return workdir


# srun as SLURM has it, for two tasks on this machine: what jax reads, and a log for each task.
SRUN = """#!/bin/bash
output=
while [[ $1 == --* ]]; do [[ $1 != --output=* ]] || output=${1#*=}; shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
for task in 0 1; do
  file=${output//%j/$SLURM_JOB_ID}
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" >"${file//%t/$task}" 2>&1 &
done
status=0
for task in 0 1; do wait -n || status=$?; done
exit $status
"""


def _sbatch(workdir, clone, settings):
    """launch/gpu/slurm.sbatch in a copy of the clone, as a job of two tasks."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, clone / name)
    (clone / "bin").mkdir()
    (clone / "bin" / "srun").write_text(SRUN)
    (clone / "bin" / "srun").chmod(0o755)
    environment = _environment(
        PATH=f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_SUBMIT_DIR=str(clone),
        SLURM_NTASKS_PER_NODE="2",
    )
    words = [str(clone / "launch" / "gpu" / "slurm.sbatch"), "--config=configs/tiny.py"]
    words += [f"--workdir={workdir}", "--", *_overrides(2, settings)]
    result = subprocess.run(
        ["bash", *words], env=environment, cwd=clone, capture_output=True, text=True, timeout=1500
    )
    logs = "\n".join(path.read_text()[-3000:] for path in (clone / "runs" / "slurm").glob("*.log"))
    assert result.returncode == 0, result.stderr + logs
    return logs


def test_two_processes_have_the_metrics_of_one(alone, tmp_path):
    """Begun by local.sh, gone on with by slurm.sbatch from the checkpoint of step 2."""
    workdir = _copy_of_start(alone, tmp_path / "run")
    rows = _train(workdir, 2, SMALL | {"train.steps": 2})
    assert (workdir / "logs" / "process-1.log").is_file()
    logs = _sbatch(workdir, tmp_path / "clone", SMALL | {"train.steps": 4})
    assert "resumed from step 2" in logs
    rows = read_rows(workdir / "metrics.jsonl")
    expected = read_rows(alone / "metrics.jsonl")
    _assert_same_figures(rows, expected)
    assert any(row["learner/grad_norm"] > 0 for row in rows), "nothing was learnt: equality proves nothing"
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (workdir, alone))
    for name in ("mean_at_n_before", "mean_at_n_after", "length_after"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    steps = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert "4" in steps and not any("tmp" in name for name in steps)
    # Two groups of four responses a step, of the first process's problems.
    assert len((workdir / "samples.jsonl").read_text().split("\n")) == 4 * 2 * 4 + 1
    assert not list(workdir.glob(".host-*"))


@pytest.mark.long
@pytest.mark.parametrize(("processes", "victim"), [(2, 1), (2, 0), (4, 2)])
def test_killing_one_process_of_a_training_ends_the_others(alone, tmp_path, processes, victim):
    """In small, for every kind of death: test_ending.py."""
    workdir = _copy_of_start(alone, tmp_path / "run")
    script = _start(
        workdir, processes, SMALL | {"train.steps": 400, "checkpoint.every": 400, "eval.every": 400}
    )
    metrics = workdir / "metrics.jsonl"
    while script.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.5)
    assert script.poll() is None, _logs(workdir)
    os.kill(_process_id(script.pid, victim), signal.SIGKILL)
    for _ in range(120):  # half seconds of ours: a machine that is suspended meanwhile does not count
        time.sleep(0.5)
        if script.poll() is not None:
            break
    assert script.poll() == 137, _logs(workdir)
    assert f"error: process {victim} ended with status 137" in script.stdout.read()


def _process_id(script, index):
    """The process id of training process `index` among the children of the script."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            environment = (stat.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == script and f"JAX_PROCESS_ID={index}".encode() in environment:
            return int(stat.parent.name)
    raise AssertionError(f"process {index} is not running")


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_tiny_has_the_metrics_of_one_process(tmp_path_factory, processes):
    """Five steps of configs/tiny.py as it is, but for the evaluations on the way."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = {"train.steps": 5, "eval.problems": 20}
    expected = _train(folder / "alone", 1, settings | {"train.rows_per_device": 32})
    workdir = _copy_of_start(folder / "alone", folder / "run")
    rows = _train(workdir, processes, settings | {"train.rows_per_device": 32 // processes})
    _assert_same_figures(rows, expected)


GOOD = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"JAX_PROCESS_ID": ""}, "not JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2 with JAX_NUM_PROCESSES 2"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "HOST:PORT"),
    ],
)
def test_a_partial_or_wrong_environment_is_one_sentence(change, named):
    with pytest.raises(ValueError, match=named) as refused:
        distributed.explicit(GOOD | change)
    assert "\n" not in str(refused.value)


def test_the_environment_gives_number_and_count():
    assert distributed.explicit(GOOD) == ("host:1", distributed.Process(1, 2))
    assert distributed.explicit({}) is None
    task = dict.fromkeys(distributed.SLURM, "1")
    assert distributed.slurm_tasks(task | {"SLURM_NTASKS": "4"}) == 4
    assert distributed.slurm_tasks(task) == 0
    assert distributed.slurm_tasks({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == 0  # the batch script itself


def test_commands_for_one_process_refuse_to_be_several(monkeypatch):
    distributed.require_alone("evaluate")
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="evaluate was started as 2 processes"):
        distributed.require_alone("evaluate")


def test_one_process_exchanges_with_itself():
    assert distributed.initialize() == distributed.Process(0, 1)
    assert distributed.allgather("x", [1.5]) == [[1.5]]
    assert distributed.allgather_items("x", [1, 2]) == [1, 2]
    assert list(distributed.Process(1, 3).share(8)) == [1, 4, 7]
