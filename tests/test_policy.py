"""Requests of training and evaluation: made in one place, and compiled ahead as they are run."""

import dataclasses

import jax
import numpy as np
import pytest
from test_rollout import CONFIGS, STOP, UNTIL, _params, compilations

from configs import base
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.algo.neighbors.eligibility import eligible_rows
from ngrpo_jax.runtime import console, mesh
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.policy import (
    abstract_policy,
    compile_rollouts,
    evaluation_request,
    make_policy,
    sequence_keys,
    training_request,
    write_responses,
)
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo

MODEL = dataclasses.replace(CONFIGS["qwen2_untied"], vocab_size=98)
CHANGES = {
    "model.dtype": "float32",
    "data.max_prompt_tokens": 40,
    "rollout.group": 3,
    "rollout.max_new_tokens": 50,
    "rollout.temperature": 0.9,
    "rollout.slots": 4,
    "rollout.chunk": 8,
    "rollout.prompts": 4,
    "train.mini_batch_prompts": 4,
    "mixing.rate": 0.3,
    "eval.samples": 2,
    "eval.pass_k": (2,),
    "eval.max_new_tokens": 55,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
    "eval.top_k": 20,
}


def _settings(**changes):
    config = base.get_config()
    config.update_from_flattened_dict({**CHANGES, **{k.replace("__", "."): v for k, v in changes.items()}})
    return resolve(config)


def _model_spec(settings):
    mixing = settings.mixing.method(UNTIL, ())
    return ModelSpec("", MODEL, TokenizerInfo(None, STOP, mixing, eligible_rows(MODEL.vocab_size, mixing.k)))


def test_a_request_is_what_the_settings_say():
    settings = _settings(eval__mixing=True)
    policy = abstract_policy(MODEL, _model_spec(settings).tokenizer_info, mesh.make_mesh(2, 2, 2), "tensor")
    training, evaluation = training_request(policy, settings), evaluation_request(policy, settings)
    assert (training.samples, training.max_new_tokens) == (3, 50)
    assert (evaluation.samples, evaluation.max_new_tokens) == (2, 55)
    sampling = training.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop_ids) == (0.9, 1.0, 0, STOP)
    assert sampling.mixing == policy.tokenizer_info.mixing
    assert evaluation.sampling == dataclasses.replace(sampling, temperature=0.6, top_p=0.95, top_k=20)
    for request in (training, evaluation):
        assert (request.slots, request.chunk, request.max_prompt_tokens) == (4, 8, 40)
        assert request.config == MODEL and request.sharding == policy.sharding
    assert not evaluation_request(policy, _settings()).sampling.mixing.mixes


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)], ids=["one device", "eight devices"])
def test_a_rollout_of_a_request_compiled_ahead_compiles_nothing(axes, capsys):
    """Whatever prompts and responses turn out to be: insertions, refills and every size of the cache."""
    settings = _settings()
    model_spec, params = _model_spec(settings), _params(MODEL)
    devices = mesh.make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
    params = jax.device_put(params, mesh.param_shardings(devices, params))
    table_VC = neighbor_table(params["embed"]["embedding"], 3, mesh=devices)
    before = make_policy(model_spec, devices, params, None, "tensor")
    policy = make_policy(model_spec, devices, params, table_VC, "tensor")
    requests = training_request(before, settings), evaluation_request(before, settings)
    compile_rollouts(before, requests)
    assert "rollouts   compiled for every size in" in capsys.readouterr().out
    shapes_alone = abstract_policy(MODEL, model_spec.tokenizer_info, devices, "tensor")  # as preflight has it
    for other in (policy, shapes_alone):
        assert requests == (training_request(other, settings), evaluation_request(other, settings))
    random, mixed = np.random.default_rng(0), []
    for request in requests:
        for lengths in ((2, 3, 9, 1), (40, 8, 33, 17), (5, 5, 40)):
            prompts = [random.integers(3, 97, size=n).tolist() for n in lengths]
            keys_B = sequence_keys(0, 1, np.arange(len(prompts) * request.samples))
            with console.Progress("", 1, "sequences", keep=False, enabled=False) as progress:
                compiled = compilations()
                written = write_responses(policy, request, prompts, keys_B, progress=progress)
            assert not compiled
            mixed.append(written.mixed_BT.any())
            assert written.lengths_B.max() > 32
    assert mixed == [True] * 3 + [False] * 3
    jax.jit(lambda x: x + 3)(np.ones(3))
    assert compiled, "the listener was never called: the test would prove nothing"
