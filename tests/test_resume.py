"""The parts of a run before its first step: what is loaded and where it lies."""

import types

import jax
import jax.numpy as jnp
import pytest

from configs import base
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.run.start import begin
from ngrpo_jax.run.state import Run
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.learner import make_learner
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.setup.resume import check_resumable, lasting_settings
from ngrpo_jax.tasks.datasets import Problem

CONFIG = ModelConfig("qwen2", 32, 16, 32, 2, 4, 2, 4, dtype="bfloat16")


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
def test_the_reference_is_a_sharded_copy_in_the_compute_dtype_and_none_without_kl(tmp_path, kl_coef):
    config = base.get_config()
    config.objective.kl_coef = kl_coef
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 2
    mesh = meshes.make_mesh(2, 2, 2)
    shardings = meshes.param_shardings(mesh, decoder.parameter_shapes(CONFIG))
    params = jax.device_put(decoder.init(jax.random.key(0), CONFIG), shardings)
    problems = ProblemSet([Problem("1", "1+1", "2")], [[1, 2]], 0)
    settings, spec = resolve(config), ModelSpec("nowhere", CONFIG, None)
    learner = make_learner(settings, CONFIG, mesh)
    fresh = types.SimpleNamespace(latest_step=lambda: None)
    run, state = begin(Run(settings, tmp_path, mesh, spec, problems, problems, learner), params, fresh)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.train_state.params)} == {jnp.dtype("float32")}
    if kl_coef == 0:
        assert run.reference is None
        return
    for own, sharding in zip(jax.tree.leaves(run.reference), jax.tree.leaves(shardings), strict=True):
        assert own.dtype == jnp.bfloat16 and own.sharding.is_equivalent_to(sharding, own.ndim)


def _settings(**model):
    config = base.get_config()
    config.model.update(model)
    return resolve(config)


def test_a_run_goes_on_in_the_dtype_that_it_was_begun_in(tmp_path):
    host = {"settings": lasting_settings(_settings(dtype="float32"))}
    check_resumable(host, 1, _settings(dtype="float32"), tmp_path)
    with pytest.raises(ValueError, match=r"model\.dtype float32, not bfloat16"):
        check_resumable(host, 1, _settings(dtype="bfloat16"), tmp_path)


def test_a_model_may_lie_elsewhere_when_a_run_goes_on(tmp_path):
    """Whether it is the same model is not read off its name: checkpoints compare its fingerprint."""
    host = {"settings": lasting_settings(_settings(path="here", revision=None))}
    check_resumable(host, 1, _settings(path="there", revision="main"), tmp_path)


def test_a_setting_that_an_older_checkpoint_does_not_store_is_not_refused(tmp_path):
    stored = lasting_settings(_settings(dtype="float32"))
    del stored["model.dtype"]
    check_resumable({"settings": stored}, 1, _settings(dtype="bfloat16"), tmp_path)
