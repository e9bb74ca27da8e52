"""A run of LoRA from end to end: it resumes, stores adapters alone, and others start from what it exports."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_commands import SMALL, _run, _timeless

from configs import tiny
from ngrpo_jax import evaluate, export, train
from ngrpo_jax.model import decoder, hf, lora
from ngrpo_jax.run import loop
from ngrpo_jax.run.state import save
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.runtime.metrics import read_rows
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.model_spec import load_params, open_checkpoint, open_model_spec

GRID = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
ADAPTERS = {"lora.rank": 4, "lora.alpha": 8.0}
CHANGES = GRID | {"train.steps": 2, "checkpoint.every": 1, "optimizer.learning_rate": 1e-2}


def _command(command, workdir, *more):
    _run(command, workdir, *more, **CHANGES | ADAPTERS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a run of two steps, and of the same, stopped after the first of them and resumed."""
    folder = tmp_path_factory.mktemp("lora")
    whole, resumed = folder / "whole", folder / "resumed"

    def save_and_copy(state, run, checkpoints, scores):
        save(state, run, checkpoints, scores)
        if run.workdir == whole and state.step == 1:
            checkpoints.wait()
            shutil.copytree(whole, resumed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save_and_copy)
        for workdir in (whole, resumed):
            _command(train, workdir)
    return whole, resumed


def _spec(workdir, **changes):
    """What a run on this workdir starts from, by settings that are changed."""
    config = tiny.get_config()
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(SMALL | {"eval.pass_k": (2,)} | CHANGES | changes)
    return open_model_spec(resolve(config), workdir)


def _devices():
    return meshes.make_mesh(*GRID.values())


def _logits(params, spec):
    ids = jnp.arange(3, 15)[None]
    return np.asarray(jax.jit(decoder.forward, static_argnums=1)(params, spec.config, ids))


def test_a_resumed_run_ends_as_one_that_was_not_stopped(runs):
    whole, resumed = runs
    rows = _timeless(whole / "metrics.jsonl")
    assert rows == _timeless(resumed / "metrics.jsonl") and len(rows) == 2
    assert all(row["learner/grad_norm"] > 0 and row["gap/max"] < 1e-4 for row in rows)
    assert (whole / "samples.jsonl").read_text() == (resumed / "samples.jsonl").read_text()
    tensors, others = (
        safetensors.numpy.load_file(workdir / "export" / "adapter_model.safetensors") for workdir in runs
    )
    assert len(tensors) == 2 * 2 * 7 and tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.any(), name
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)


def test_neighbours_are_searched_once_in_a_run(runs):
    first, second = read_rows(runs[0] / "metrics.jsonl")
    assert first["table/cost"] == 1.0 and "table/cost" not in second
    assert min(row["rollout/mixed_fraction"] for row in (first, second)) > 0.1


def test_a_checkpoint_holds_adapters_and_their_state_alone(runs):
    (document,) = (runs[0] / "checkpoints" / "2" / "host").glob("metadata")
    shapes = json.loads(document.read_text())["shapes"]
    held = {name: shape for name, (shape, _) in shapes.items() if name.startswith("train/") and shape}
    assert len(held) == 3 * 14, held  # each adapter, with both of Adam's moments
    assert {name.rpartition("/")[2] for name in held} == {"lora_a", "lora_b"}
    assert not [name for name in held if 4 not in held[name]]


def test_others_start_from_the_adapter_that_is_exported(runs):
    """Trained on, or merged and trained whole: both begin as the run ended."""
    whole, _ = runs
    own = _spec(whole, **ADAPTERS)
    step, params = open_checkpoint(own, whole, _devices(), "latest", "mean_at_n")
    assert step == 2
    start = {"model__path": str(whole / "warm_start"), "model__adapter": str(whole / "export")}
    further = load_params(_spec(whole, **start, **ADAPTERS), _devices())
    jax.tree.map(np.testing.assert_array_equal, further, params)
    alone = _spec(whole, **start)
    merged = load_params(alone, _devices())
    assert alone.config.lora is None and not jax.tree.leaves(lora.split(merged)[1])
    assert all(
        leaf.sharding == other.sharding
        for leaf, other in zip(*map(jax.tree.leaves, (merged, lora.split(params)[1])), strict=True)
    )
    logits = _logits(params, own)
    np.testing.assert_allclose(_logits(merged, alone), logits, atol=1e-5)
    assert np.max(np.abs(_logits(lora.split(params)[1], alone) - logits)) > 1e-2


def test_a_merged_export_is_the_model_with_its_adapters(runs, tmp_path, capsys):
    whole, _ = runs
    _command(export, whole, "--merge", "--step=latest", f"--out={tmp_path / 'merged'}")
    assert "parameters in float32" in capsys.readouterr().out
    config, merged = hf.load(tmp_path / "merged")
    own = _spec(whole, **ADAPTERS)
    _, params = open_checkpoint(own, whole, _devices(), "latest", "mean_at_n")
    ids = jnp.arange(3, 15)[None]
    forward = jax.jit(decoder.forward, static_argnums=1)
    np.testing.assert_allclose(forward(merged, config, ids), _logits(params, own), atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert "adapter" not in "".join(file.name for file in (tmp_path / "merged").iterdir())


def test_evaluate_grades_the_adapters_of_a_run(runs, capsys):
    whole, _ = runs
    _command(evaluate, whole, "--step=latest")
    assert "checkpoint step 2" in capsys.readouterr().out
    _, *rows = (whole / "generations_2_arithmetic.jsonl").read_text().split("\n")[:-1]
    rewards = [json.loads(row)["reward"] for row in rows]
    summary = json.loads((whole / "summary.json").read_text())
    assert len(rewards) == 8 and np.mean(rewards) == summary["mean_at_n_after"]
