"""The real command on very small shapes: started, ended by a fault, and compared with a run without one."""

import json
import os
import pathlib
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
