"""A run that goes on: its first or restored state, and which settings may be others than before."""

import json
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, tiny
from ngrpo_jax import former_settings
from ngrpo_jax.errors import UserError
from ngrpo_jax.learner import supervised
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.run.start import begin
from ngrpo_jax.run.state import Run, save
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import WarmStartSettings, resolve
from ngrpo_jax.setup.learner import make_learner
from ngrpo_jax.setup.model_spec import ModelSpec, locate_model
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.setup.resume import allowed_changes, check_resumable, lasting_settings
from ngrpo_jax.tasks.datasets import Problem, fingerprint

CONFIG = ModelConfig("qwen2", 32, 16, 32, 2, 4, 2, 4, dtype="bfloat16")
PROBLEMS = ProblemSet([Problem("1", "1+1", "2")], [[1, 2]])
FRESH = types.SimpleNamespace(newest_good=lambda warn: None, put_back=lambda: None)


def _run(workdir, problems=PROBLEMS, **changes):
    """A run on eight devices, and the parameters that it starts from."""
    config = base.get_config()
    config.update_from_flattened_dict({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2} | changes)
    settings, mesh = resolve(config), meshes.make_mesh(2, 2, 2)
    shardings = meshes.param_shardings(mesh, decoder.parameter_shapes(CONFIG))
    params = jax.device_put(decoder.init(jax.random.key(0), CONFIG), shardings)
    spec, learner = ModelSpec("nowhere", CONFIG, None), make_learner(settings, CONFIG, mesh)
    return Run(settings, workdir, mesh, spec, problems, problems, learner), params


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
def test_the_reference_is_a_sharded_copy_in_the_compute_dtype_and_none_without_kl(tmp_path, kl_coef):
    run, params = _run(tmp_path, **{"objective.kl_coef": kl_coef})
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    run, state = begin(run, params, FRESH)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.train_state.params)} == {jnp.dtype("float32")}
    if kl_coef == 0:
        assert run.reference is None
        return
    for own, sharding in zip(jax.tree.leaves(run.reference), jax.tree.leaves(shardings), strict=True):
        assert own.dtype == jnp.bfloat16 and own.sharding.is_equivalent_to(sharding, own.ndim)


# Checkpoints


class _EarlierTrainState(NamedTuple):
    """As versions saved it that counted optimiser steps beside those of the optimiser."""

    params: Any
    opt_state: Any
    step: jax.Array


def test_a_state_is_restored_and_other_problems_are_refused(tmp_path):
    run, params = _run(tmp_path)
    _, state = begin(run, params, FRESH)
    with Checkpoints(tmp_path / "checkpoints", model={}) as checkpoints:
        save(state, run, checkpoints, None)
        checkpoints.wait()
        _, restored = begin(run, _run(tmp_path)[1], checkpoints)
        assert restored.step == state.step == 0
        jax.tree.map(np.testing.assert_array_equal, restored.train_state, state.train_state)
        other = ProblemSet([Problem("1", "1+1", "3")], [[1, 2]])
        with pytest.raises(ValueError, match="the problems to train on have changed since the checkpoint at"):
            begin(*_run(tmp_path, problems=other), checkpoints)


def test_a_checkpoint_of_the_earlier_order_of_problems_is_resumed_with_a_warning(tmp_path, capsys):
    run, params = _run(tmp_path)
    _, state = begin(run, params, FRESH)
    earlier = _EarlierTrainState(*state.train_state, jnp.zeros((), jnp.int32))
    host = {
        "settings": lasting_settings(run.settings)
        | {"objective.old_logprobs": "trainer", "rollout.top_k": 0},
        "stream": {"taken": 64, "data": fingerprint(PROBLEMS.problems, 0)},
        "table_age": 1,
        "before": {"mean_at_n": 0.5},
    }
    with Checkpoints(tmp_path / "checkpoints", model={}) as checkpoints:
        checkpoints.save(1, {"train": earlier, "table": {"ids": jnp.zeros(3)}}, host)
        checkpoints.wait()
        _, restored = begin(run, _run(tmp_path)[1], checkpoints)
        other = ProblemSet([Problem("1", "1+1", "3")], [[1, 2]])
        with pytest.raises(ValueError, match="the problems to train on have changed"):
            begin(*_run(tmp_path, problems=other), checkpoints)
    assert "took the problems in another order: after step 1" in " ".join(capsys.readouterr().out.split())
    assert (restored.step, restored.initial_evaluation, restored.table) == (1, {"mean_at_n": 0.5}, None)
    jax.tree.map(np.testing.assert_array_equal, restored.train_state, state.train_state)


# Settings


def _settings(**changes):
    config = base.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return resolve(config)


def _resume(stored, here, workdir="run"):
    check_resumable({"settings": json.loads(json.dumps(stored))}, 1, here, workdir)


def _refused(stored, here, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        _resume(stored, here)
    assert "\n" not in str(refusal.value)


def test_what_changes_the_numbers_of_a_run_is_refused_by_name():
    stored = lasting_settings(_settings(model__dtype="float32", eval__pass_k=(2, 4)))
    _resume(stored, _settings(model__dtype="float32", eval__pass_k=(2, 4)))
    _refused(
        stored, _settings(eval__pass_k=(2, 4)), r"made with model\.dtype float32, not bfloat16; use those"
    )
    _refused(stored, _settings(model__dtype="float32"), r"eval\.pass_k \[2, 4\], not \[16, 32\]")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model__path", "there"),
        ("model__revision", "main"),
        ("reward__deadline_s", 60.0),
        ("reward__memory_mb", 4096),
        ("mesh__data", 4),
        ("rollout__slots", 3),
        ("train__steps", 9),
    ],
)
def test_where_and_how_fast_a_run_goes_may_change(name, value):
    _resume(lasting_settings(_settings()), _settings(**{name: value}))


def test_what_an_earlier_version_stored_and_may_change_today_is_passed_over():
    _resume(lasting_settings(_settings()) | {"reward.deadline_s": 1.0}, _settings())


def test_a_setting_that_did_not_exist_yet_has_its_default():
    stored = lasting_settings(_settings())
    del stored["mixing.sigma"]
    _resume(stored, _settings())
    _refused(stored, _settings(mixing__sigma=0.5), r"mixing\.sigma 0\.33, not 0\.5")


def test_the_dtype_that_the_first_versions_did_not_store_may_be_any():
    stored = lasting_settings(_settings())
    del stored["model.dtype"]
    _resume(stored, _settings(model__dtype="float32"))


def test_a_renamed_setting_is_compared_under_its_new_name(monkeypatch):
    monkeypatch.setitem(former_settings.RENAMED, "rollout.samples", "rollout.group")
    stored = lasting_settings(_settings())
    stored["rollout.samples"] = stored.pop("rollout.group")
    _resume(stored, _settings())
    _refused(stored, _settings(rollout__group=8), r"rollout\.group 4, not 8")


def test_a_renamed_value_is_compared_as_what_it_is_called_today():
    stored = lasting_settings(_settings()) | {"objective.old_logprobs": "trainer"}
    _resume(stored, _settings())
    _refused(stored, _settings(objective__old_logprobs="sampler"), "old_logprobs learner, not sampler")


def test_a_removed_setting_may_only_have_had_its_last_default():
    stored = lasting_settings(_settings())
    _resume(stored | {"rollout.top_p": 1.0, "rollout.top_k": 0}, _settings())
    _refused(
        stored | {"rollout.top_p": 0.9}, _settings(), r"rollout\.top_p 0\.9, which is no setting of this"
    )


def test_a_setting_of_a_later_version_is_refused_by_name():
    stored = lasting_settings(_settings()) | {"rollout.invented": None}
    _refused(stored, _settings(), r"rollout\.invented None, which is no setting of this version")


def test_a_run_beyond_its_last_step_is_refused():
    with pytest.raises(ValueError, match=r"run is at step 3 already; raise train\.steps, which is 2"):
        check_resumable({"settings": lasting_settings(_settings())}, 3, _settings(train__steps=2), "run")


def test_a_warm_start_is_compared_as_a_checkpoint_is(tmp_path):
    """Its settings were nested in earlier versions, and may lack a setting that is new."""
    config = tiny.get_config()
    nested = {"seed": config.seed, "data": config.data.to_dict(), "warm_start": config.warm_start.to_dict()}
    for name in ("eval", "overlap_with", "drop_overlap", "chat_template"):
        del nested["data"][name]
    (tmp_path / "warm_start").mkdir()
    (tmp_path / "warm_start.json").write_text(json.dumps(nested))
    assert locate_model(resolve(config), tmp_path) == tmp_path / "warm_start"
    config.warm_start.steps = 7
    with pytest.raises(ValueError, match=r"warm_start was made with warm_start\.steps \d+, not 7; use those"):
        locate_model(resolve(config), tmp_path)


DAMAGED = {b"{": "is not JSON", b"[]": "no JSON object", b"\xff": "not UTF-8"}


@pytest.mark.parametrize(("content", "words"), DAMAGED.items())
def test_a_damaged_record_of_a_warm_start_is_named(tmp_path, content, words):
    (tmp_path / "warm_start").mkdir()
    (tmp_path / "warm_start.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"warm_start\.json .*{words}"):
        locate_model(resolve(tiny.get_config()), tmp_path)


def test_changes_that_are_allowed_by_name_pass_and_others_do_not():
    stored = lasting_settings(_settings())
    changed = _settings(rollout__group=8, rollout__temperature=0.5)
    host = {"settings": stored}
    check_resumable(host, 3, changed, "run", allowed_changes("rollout.group,rollout.temperature"))
    with pytest.raises(UserError, match=r"made with rollout\.temperature 0\.7, not 0\.5; use those"):
        check_resumable(host, 3, changed, "run", allowed_changes("rollout.group"))
    assert allowed_changes(None) == allowed_changes("") == frozenset()
    with pytest.raises(UserError, match=r"--allow-changes names rollout\.grup; it takes"):
        allowed_changes("rollout.grup,model")


@pytest.mark.parametrize("steps", [1, 2, 600])
def test_a_warm_start_may_have_any_number_of_steps(steps):
    optimizer = supervised._optimizer(WarmStartSettings(steps=steps))
    params = {"x": jnp.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jnp.isfinite(updates["x"]).all()
