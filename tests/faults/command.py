"""The real command on very small shapes: started, ended by a fault, and compared with a run without one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

from ngrpo_jax.runtime.metrics import VARYING_GROUPS

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    "warm_start.num_layers": 2,
    "warm_start.hidden_size": 32,
    "warm_start.intermediate_size": 48,
    "warm_start.steps": 5,
    "warm_start.batch": 8,
    "data.train_size": 60,
    "rollout.prompts": 4,
    "rollout.group": 4,
    "rollout.max_new_tokens": 12,
    "rollout.slots": 16,
    "train.mini_batch_prompts": 2,
    "train.row_tokens": 64,
    "train.rows_per_device": 4,
    "train.steps": 12,
    "train.unroll": False,
    "checkpoint.every": 3,
    "eval.every": 4,
    "eval.problems": 6,
    "eval.samples": 2,
    "eval.pass_k": 2,
    "eval.max_new_tokens": 12,
    "mixing.rate": 0.5,
    "reward.kind": "own_reward:odd_length",  # of a model that solves nothing, still not the same for all
}


def start(workdir, *more, command="train", environment=None, **changes):
    """The process of a command on a workdir, its output in WORKDIR.out and WORKDIR.err (appended)."""
    settings = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    words = [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NGRPO_DEBUG")}
    kept |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "tests"), "HF_HUB_OFFLINE": "1"}
    with open(f"{workdir}.out", "ab") as out, open(f"{workdir}.err", "ab") as err:
        return subprocess.Popen(
            [sys.executable, "-m", f"ngrpo_jax.{command}", "--config=configs/tiny.py", *words, *more],
            cwd=ROOT,
            env=kept | (environment or {}),
            stdout=out,
            stderr=err,
        )


class Group:
    """The processes of one run: one alone, or several that talk on this machine as hosts do."""

    def __init__(self, workdir, count=1):
        if count == 1:
            self.processes = [start(workdir)]
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        self.processes = [
            start(workdir, environment=told | {"JAX_PROCESS_ID": str(index)}, mesh__data=count)
            for index in range(count)
        ]

    def poll(self):
        """None while one of them runs."""
        return None if any(process.poll() is None for process in self.processes) else 0

    def send_signal(self, number):
        """To all of them, as launchers do."""
        for process in self.processes:
            process.send_signal(number)

    def wait(self):
        """The one status of all, or the list of their statuses where these differ."""
        statuses = [process.wait() for process in self.processes]
        return statuses[0] if len(set(statuses)) == 1 else statuses


def listens(group):
    """Whether all processes of a group have a handler for SIGTERM."""
    masks = []
    for process in group.processes:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it has ended
            continue
        masks.append(int(status.partition("SigCgt:")[2].split()[0], 16))
    return all(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


def holdings(pid):
    """What a process and its descendants hold: resident MB, open files, threads; and how many they are."""
    pids, found = [pid], {"MB": 0.0, "handles": 0, "threads": 0, "processes": 0}
    for one in pids:  # grows on the way
        try:
            tasks = list(pathlib.Path(f"/proc/{one}/task").iterdir())
            pages = int(pathlib.Path(f"/proc/{one}/statm").read_text().split()[1])
            handles = len(list(pathlib.Path(f"/proc/{one}/fd").iterdir()))
            pids += [int(n) for task in tasks for n in (task / "children").read_text().split()]
        except OSError:  # it has ended meanwhile
            continue
        found["MB"] += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        found["threads"] += len(tasks)
        found["handles"] += handles
        found["processes"] += 1
    return found


def said(workdir):
    """What the commands on a workdir wrote to stderr."""
    path = pathlib.Path(f"{workdir}.err")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def differences(workdir, other):
    """What two finished runs differ in: weights, samples, metrics without times, summary, remains."""
    found = [
        name
        for name in ("export/model.safetensors", "samples.jsonl")
        if (workdir / name).read_bytes() != (other / name).read_bytes()
    ]
    if _rows(workdir) != _rows(other):
        found.append("metrics.jsonl")
    if _summary(workdir) != _summary(other):
        found.append("summary.json")
    leftover = [path.name for path in workdir.iterdir() if "partial" in path.name or "tmp" in path.name]
    leftover += [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]
    return found + leftover


def _rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(VARYING_GROUPS)} for row in rows]


def _summary(workdir):
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    return {k: v for k, v in summary.items() if k != "seconds" and not str(v).startswith("/")}
