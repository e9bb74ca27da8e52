"""What a run writes and prints at its end, and how its processes get there together."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from configs import tiny
from ngrpo_jax.errors import UserError
from ngrpo_jax.model import decoder, hf
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.run import summary
from ngrpo_jax.run.state import Run, RunState
from ngrpo_jax.runtime import distributed
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.model_spec import ModelSpec

CONFIG = ModelConfig("qwen2", 32, 16, 32, 2, 4, 2, 4, tie_embeddings=True)
ROW = {"groups/zero_variance": 0.25, "rollout/mixed_fraction": 0.1, "gap/max": 1e-5}
MIXED = {"rollout/mix_cosine_mean": 0.5, "rollout/mix_cosine_min": 0.25}
ROWS = [{"step": 1, **ROW, **MIXED}, {"step": 2, **ROW, "gap/max": 3e-5, "eval/mean_at_n": 0.75}]
BEFORE = {"mean_at_n": 0.5, "pass_at_k": 0.6, "length_mean": 7.0}
AFTER = {"mean_at_n": 0.75, "pass_at_k": 0.8, "length_mean": 5.0}


def _finished(workdir):
    """A run of two steps at its end, with random parameters; of its checkpoints, step 2 is the best."""
    (workdir / "source").mkdir(parents=True)
    (workdir / "source" / "tokenizer.json").write_text("{}")
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = resolve(tiny.get_config())
    spec = ModelSpec(str(workdir / "source"), CONFIG, None)
    run = Run(settings, workdir, None, spec, None, None, None)
    params = decoder.init(jax.random.key(0), CONFIG)
    state = RunState(2, types.SimpleNamespace(params=params), None, BEFORE)
    return run, state, types.SimpleNamespace(best_step=lambda: 2)


@pytest.mark.parametrize("index", [0, 1])
def test_the_first_process_exports_and_sums_up_before_any_process_ends(monkeypatch, tmp_path, index):
    run, state, checkpoints = _finished(tmp_path)
    there = []
    monkeypatch.setattr(distributed, "process", lambda: distributed.Process(index, 2))
    monkeypatch.setattr(
        distributed, "allgather", lambda name, value: there.append((tmp_path / "summary.json").is_file())
    )
    summary.finish(run, state, AFTER, checkpoints, 1.0)
    assert there == [index == 0]
    assert (tmp_path / "export").is_dir() == (index == 0)


def test_a_finished_run_is_summed_up_on_disk_and_in_print(tmp_path, capsys):
    run, state, checkpoints = _finished(tmp_path)
    summary.finish(run, state, AFTER, checkpoints, 90.0)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["mean_at_n_before"] == 0.5 and written["mean_at_n_after"] == 0.75
    assert written["pass_at_k_before"] == 0.6 and written["pass_at_k_after"] == 0.8
    assert (written["steps"], written["seconds"]) == (2, 90.0)
    assert (written["best_step"], written["best_value"]) == (2, 0.75)
    assert written["sampler_learner_gap_max"] == 3e-5
    assert written["mix_cosine_mean"] == 0.5, "the step without mixed inputs is not counted"
    printed = capsys.readouterr().out
    assert f"best       {tmp_path}/checkpoints/2 (step 2, mean_at_n 0.75 held out)" in printed
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    summary.print_finished(written, run.settings, moved)
    printed = capsys.readouterr().out
    assert f"latest     {moved}/checkpoints/2 (step 2)" in printed and f"export     {moved}/export" in printed
    assert f"{tmp_path}/" not in printed, "the place where the run was"
    moved.rename(tmp_path)
    exported = hf.load(tmp_path / "export")[1]
    jax.tree.map(np.testing.assert_array_equal, exported, state.train_state.params)


@pytest.mark.parametrize(
    ("start", "words"), [(0.75, "0.75 held out)"), (0.8, "held out; below the starting")]
)
def test_a_best_checkpoint_below_the_start_is_called_that(tmp_path, capsys, start, words):
    run, state, checkpoints = _finished(tmp_path)
    state = dataclasses.replace(state, initial_evaluation=BEFORE | {"mean_at_n": start})
    summary.finish(run, state, AFTER, checkpoints, 90.0)
    printed = capsys.readouterr().out
    assert words in printed and printed.count("below the starting model's 0.8)") == (start > 0.75)


def test_fewer_problems_than_prompts_are_mentioned():
    assert summary._repeats(32, 32) == ""
    assert summary._repeats(3, 32).endswith("only 3 problems: each comes about 10.7 times a step")


def test_only_a_summary_of_as_many_steps_counts_as_finished(tmp_path):
    assert summary.read_finished(tmp_path, 1) is None
    whole = dict.fromkeys(summary.SHOWN) | {"steps": 2}
    (tmp_path / "summary.json").write_text(json.dumps(whole))
    assert summary.read_finished(tmp_path, 2) == whole and summary.read_finished(tmp_path, 3) is None


@pytest.mark.parametrize("text", ["{}", '{"steps": 2}', '{"steps": "2"}', "[1]", "{", "\xff"])
def test_a_file_that_is_no_summary_is_named(tmp_path, text):
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"summary\.json .*; remove it, and the run goes on"):
        summary.read_finished(tmp_path, 2)


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 1')
    with pytest.raises(ValueError, match=r"summary\.json is not JSON .*; remove it") as refusal:
        summary.read_finished(tmp_path, 1)
    assert "\n" not in str(refusal.value)
