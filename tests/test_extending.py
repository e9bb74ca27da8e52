"""docs/extending.md: its code does what the page says, all five examples in one run."""

import __future__

import csv
import importlib
import json
import pathlib
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from test_commands import SMALL, TINY

from ngrpo_jax import train
from ngrpo_jax.algo import objectives
from ngrpo_jax.algo.mixture import strategies
from ngrpo_jax.flags import run_command
from ngrpo_jax.runtime import loggers

REGISTRIES = (strategies.STRATEGIES, objectives.ALGORITHMS, loggers.LOGGERS)
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """Every block of the page at its place: in the module that its first line names, or in a new file."""
    before = [dict(registry) for registry in REGISTRIES]
    monkeypatch.syspath_prepend(tmp_path)
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    for place, code in blocks:
        if not place.startswith("ngrpo_jax/"):
            (tmp_path / place).write_text(code)
            continue
        name = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        module = importlib.import_module(name) if (PAGE.parent.parent / place).exists() else None
        if module is None:
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
        lazy = __future__.annotations.compiler_flag  # as some files of the package have it
        exec(compile(code, place, "exec", lazy), module.__dict__)
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_the_objective_of_the_page(extended):
    random = np.random.default_rng(0)
    logprobs, old = random.normal(-1, 0.5, (2, 3, 4)).astype(np.float32)
    advantages, weight = np.array([1.0, -2.0, 0.5], np.float32), np.full((3, 4), 1 / 12, np.float32)
    loss, _ = objectives.policy_loss(
        jnp.asarray(logprobs), jnp.asarray(old), jnp.asarray(advantages), jnp.asarray(weight),
        algorithm="unclipped",
    )  # fmt: skip
    expected = -np.sum(weight * np.exp(logprobs - old) * advantages[:, None])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_all_examples_in_one_run(extended, tmp_path):
    chosen = SMALL | {
        "train.steps": 1,
        "mixing.strategy": "uniform",
        "mixing.k": 4,
        "objective.algorithm": "unclipped",
        "reward.kind": "my_rewards:right_and_short",
        "data.eval": "my_data:doubles",
        "train.loggers": '("tensorboard", "spreadsheet")',
    }
    workdir = tmp_path / "run"
    argv = ["train", f"--config={TINY}", f"--workdir={workdir}"]
    run_command(train.main, argv + [f"--config.{name}={value}" for name, value in chosen.items()])
    (row,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert row["rollout/mixed_fraction"] > 0
    assert row["rollout/mix_anchor_weight"] == pytest.approx(0.25)  # one of four, all alike
    written = {name: value for _, name, value in csv.reader((workdir / "metrics.csv").open(newline=""))}
    assert float(written["reward/mean"]) == row["reward/mean"]
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 1
