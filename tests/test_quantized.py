"""The rollout's matrices in int8: what is rounded, by how much, and that products are of what was rounded."""

import dataclasses

import jax
import numpy as np
import pytest
from test_rollout import BASE, CONFIGS, UNTIL, _generate, _params, _same

from configs import base
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.model import decoder
from ngrpo_jax.model.inference import InferenceModel, to_inference_layout
from ngrpo_jax.rollout import decode
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import resolve

MATRICES = {
    ("attention", "qkv"): -1,
    ("attention", "o"): (1, 2, 3),
    ("mlp", "gate_up"): -1,
    ("mlp", "down"): -1,
}


def _restored(layer):
    """A layer of float32 matrices from one of int8: int8 times the scale of its output."""
    layer = jax.tree.map(np.asarray, layer)
    for (room, name), inputs in MATRICES.items():
        weight = layer[room][name]
        scale = np.expand_dims(weight.pop("kernel_scale"), inputs)
        assert weight["kernel"].dtype == np.int8
        weight["kernel"] = weight["kernel"].astype(np.float32) * scale
    return layer


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3"])
def test_each_output_channel_is_rounded_to_its_largest_weight_and_nothing_else_is(name):
    config = CONFIGS[name]
    params = _params(config)
    params["layers"]["mlp"]["down"]["kernel"] = params["layers"]["mlp"]["down"]["kernel"].at[:, :, 3].set(0)
    exact = jax.tree.map(np.asarray, to_inference_layout(params, config))
    rounded = to_inference_layout(params, config, "int8")
    for before, after in zip(exact["layers"], map(_restored, rounded["layers"]), strict=True):
        for (room, name), inputs in MATRICES.items():
            kernel, found = before[room][name]["kernel"], after[room][name].pop("kernel")
            largest = np.abs(kernel).max(axis=inputs, keepdims=True)
            assert (np.abs(found - kernel) <= largest / 254 * 1.001).all()
            before[room][name] = {key: x for key, x in before[room][name].items() if key != "kernel"}
        jax.tree.map(np.testing.assert_array_equal, before, after)
    others = ({k: x for k, x in tree.items() if k != "layers"} for tree in (exact, rounded))
    jax.tree.map(np.testing.assert_array_equal, *others)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_products_are_of_the_rounded_matrices(platform):
    config = CONFIGS["qwen2_untied"]
    rounded = to_inference_layout(_params(config), config, "int8")
    restored = rounded | {"layers": tuple(map(_restored, rounded["layers"]))}
    model, ids = InferenceModel(config, platform), np.arange(12).reshape(2, 6)
    lengths = np.array([6, 4])
    found, expected = (
        decode.prefill(params, ids, lengths, model=model).hidden_PD for params in (rounded, restored)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_rounded_rollouts_of_eight_devices_write_what_one_does():
    config = dataclasses.replace(BASE, vocab_size=98)
    params = _params(config)
    options = dict(mixing=Mixing(rate=0.3, k=3, until_ids=UNTIL), chunk=8)
    options["table_VC"] = neighbor_table(params["embed"]["embedding"], 3)
    rounded = to_inference_layout(params, config, "int8")
    one = _generate(rounded, config, slots=8, **options)
    mesh = meshes.make_mesh(2, 2, 2)
    placed = jax.device_put(rounded, meshes.param_shardings(mesh, rounded, layout="tensor"))
    options["table_VC"] = jax.device_put(options["table_VC"], meshes.replicated(mesh))
    sharding = meshes.slots_sharding(mesh, "tensor")
    _same(one, _generate(placed, config, slots=8, sharding=sharding, **options))
    assert not np.array_equal(one.logprobs_BT, _generate(params, config, slots=8, **options).logprobs_BT)


def test_a_step_reads_little_more_than_half_of_the_bytes():
    """DeepSeek-R1-Distill-Qwen-1.5B: all weights but the embedding, of which a step reads rows."""
    from benchmarks.shapes import SHAPES

    def read(quantize):
        params = jax.eval_shape(
            lambda tree: to_inference_layout(tree, SHAPES["r1-1.5b"], quantize),
            decoder.parameter_shapes(SHAPES["r1-1.5b"]),
        )
        del params["embed"]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

    assert read("int8") <= 0.6 * read(None)


@pytest.mark.parametrize(
    "objective, sentence",
    [
        ({}, r"rollout.quantize is 'int8' without importance weights.*set objective.importance_cap"),
        ({"old_logprobs": "sampler"}, "is then clipped for the rounding of weights rather than for updates"),
    ],
)
def test_a_rounded_sampler_needs_importance_weights(objective, sentence):
    config = base.get_config()
    config.rollout.quantize = "int8"
    config.objective.update(objective)
    with pytest.raises(ValueError, match=sentence):
        resolve(config)
