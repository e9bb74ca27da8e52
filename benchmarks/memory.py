"""The memory of a training step, phase by phase: by calculation, and as the kernel counted it.

    python benchmarks/memory.py [--case=tiny|middle|smollm2] [--json=FILE]

Each case is a run of this project with random weights of its size, in a process of its own: the table is
built, responses are written and the update is made by what the training command calls, once to compile and
once to be counted. Prompts and responses are as long as the settings allow, which is what the calculation
(preflight/memory.py) is about.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from benchmarks import measure, shapes
from ngrpo_jax import flags
from ngrpo_jax.algo.neighbors.eligibility import eligible_rows
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import parameter_count
from ngrpo_jax.preflight import fit, memory
from ngrpo_jax.run.metrics import Rollout
from ngrpo_jax.run.neighbor_table import refresh_table
from ngrpo_jax.run.start import begin
from ngrpo_jax.run.state import Run, RunState
from ngrpo_jax.run.step import learn, policy_of, roll_out
from ngrpo_jax.runtime import mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.runtime.console import format_bytes, format_count
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.learner import make_learner
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo
from ngrpo_jax.tasks.datasets import Problem
from ngrpo_jax.tasks.rewards import Counts

ROOT = pathlib.Path(__file__).parent.parent
GOAL = 0.15
# Every array gets pages of its own and gives them back: what malloc keeps for later would blur the count.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "XLA_FLAGS": ""}


class Case(NamedTuple):
    """A config of configs/, what is changed in it, and the sizes of its model."""

    config: str
    model: ModelConfig
    changes: dict[str, Any]


CASES = {
    "tiny": Case("tiny", ModelConfig("qwen2", 109, 128, 640, 4, 4, 2, 32, tie_embeddings=True), {}),
    # Long rows: blockwise attention, layers recomputed, a cache that is worth its name.
    "middle": Case(
        "base",
        ModelConfig("qwen2", 24576, 384, 1024, 6, 6, 6, 64, tie_embeddings=False),
        {
            "model.dtype": "float32",
            "data.max_prompt_tokens": 128,
            "rollout.prompts": 2,
            "rollout.group": 2,
            "rollout.max_new_tokens": 896,
            "rollout.slots": 4,
            "eval.max_new_tokens": 896,
            "train.mini_batch_prompts": 1,
        },
    ),
    "smollm2": Case("smollm2", shapes.SHAPES["smollm2"], {}),
}


def main() -> None:
    """Asks a process for each case and prints the table."""
    given = _arguments()
    if given.measure:
        print(json.dumps(measured(CASES[given.measure])))
        return
    report = measure.Report("Memory of a training step")
    rows = []
    for name in [given.case] if given.case else CASES:
        measure.say(f"{name}: a process of its own")
        command = [sys.executable, __file__, f"--measure={name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | ENVIRONMENT, check=True)
        phases = json.loads(done.stdout.splitlines()[-1])
        size = format_count(parameter_count(CASES[name].model))
        for phase, (calculated, found) in phases.items():
            cells = format_bytes(calculated), format_bytes(found), calculated / found
            rows.append((f"{name}, {size} parameters", phase, *cells))
    report.table(
        "Memory: the most that a phase holds",
        ("model", "phase", "calculated", "measured", "calculated / measured"),
        rows,
        "Calculated: preflight/memory.py. Measured: the kernel's count of the most memory that the process "
        f"held, less what it needs without arrays. Goal for rollout and update: within {GOAL:.0%}.",
    )
    report.save(given.json)


def measured(case: Case) -> dict[str, tuple[int, int]]:
    """Phase -> bytes calculated and bytes measured, of a whole step."""
    settings = _settings(case)
    allocations = fit.training_memory(settings, case.model, mesh.make_mesh(1, 1, 1))
    always = memory.held(allocations, "always")
    with tempfile.TemporaryDirectory() as folder:
        run, state = _begin(case.model, settings, pathlib.Path(folder))
        state, _ = _step(run, state)
        _, peaks = _step(run, dataclasses.replace(state, table=None))  # it is built anew
    return {phase: (always + memory.held(allocations, phase), peak) for phase, peak in peaks.items()}


def _settings(case: Case) -> Settings:
    config = flags.load_config(str(ROOT / "configs" / f"{case.config}.py"))
    config.update_from_flattened_dict(case.changes)
    return resolve(config)


def _begin(config: ModelConfig, settings: Settings, workdir: pathlib.Path) -> tuple[Run, RunState]:
    """A run with random weights and as many random prompts as a step takes, none with an end in sight."""
    draw, rows = np.random.default_rng(0), config.vocab_size
    mixing = settings.mixing.method((), ())
    tokenizer_info = TokenizerInfo(None, (), mixing, eligible_rows(rows, mixing.k))
    model_spec = ModelSpec("", config, tokenizer_info)
    count = settings.rollout.prompts
    ids_PT = draw.integers(rows, size=(count, settings.data.max_prompt_tokens))
    problems = [Problem(str(i), "", "") for i in range(count)]
    training = ProblemSet(problems, ids_PT.tolist(), 0)
    devices = mesh.make_mesh(1, 1, 1)
    params = shapes.random_params(config, stacked=True, dtype="float32")
    learner = make_learner(settings, config, devices)
    run = Run(settings, workdir, devices, model_spec, training, training, learner)
    with Checkpoints(workdir, model=None, best="") as none:
        return begin(run, params, none)


def _step(run: Run, state: RunState) -> tuple[RunState, dict[str, int]]:
    """`run.step.train_step` without grading, in three parts; where it leads, and the peak of each part."""
    peaks: dict[str, int] = {}
    table, _ = _counted(peaks, "table", lambda: refresh_table(run, state))

    def write() -> Any:
        return roll_out(run, policy_of(run, state.train_state.params, table), run.training, step=1)

    trajectories = _counted(peaks, "rollout", write)
    rewards_PG = np.resize([0.0, 1.0], (len(run.training.prompts), run.settings.rollout.group))
    rollout = Rollout(run.training, trajectories, rewards_PG, Counts())
    work = lambda: learn(run, state.train_state, table, rollout, {})  # noqa: E731
    train_state, table, _ = _counted(peaks, "update", work)
    return RunState(state.step + 1, train_state, table, {}), peaks


def _counted(peaks: dict[str, int], name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; notes the most bytes that arrays and scratch took meanwhile."""
    gc.collect()
    without = measure.current_rss() - sum(array.nbytes for array in jax.live_arrays())
    measure.reset_peak_rss()
    result = jax.block_until_ready(work())
    peaks[name] = measure.peak_rss() - without
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=CASES, help="one case alone; all of them take minutes")
    parser.add_argument("--json", metavar="FILE", help="where the figures go as well")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
