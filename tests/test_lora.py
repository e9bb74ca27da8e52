"""LoRA against PEFT's logits and gradients, the update that trains adapters alone, and what is refused."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import learner_case as case
import numpy as np
import optax
import pytest
import safetensors.numpy
from test_neighbor_table import _fake_run, _state
from test_rollout import CONFIGS, UNTIL, _generate, _packed_gap, _params

from configs import base as base_config
from ngrpo_jax import export
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.errors import UserError
from ngrpo_jax.learner import update
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.model import decoder, hf, inference, lora, peft
from ngrpo_jax.model.config import Lora
from ngrpo_jax.run.neighbor_table import add_drift, copy_rows, neighbors, refresh_table
from ngrpo_jax.run.state import Run
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.model_spec import as_trained, locate_adapter
from ngrpo_jax.tasks import arithmetic

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("qwen2_untied", "qwen3", "llama")
every_architecture = pytest.mark.parametrize("name", NAMES)

forward = jax.jit(decoder.forward, static_argnums=1)
merged = jax.jit(lora.merged, static_argnums=1)


class Golden(NamedTuple):
    """A model with the adapters that PEFT made for it; `config` is with adapters, `base` without."""

    config: object
    base: dict
    adapters: dict
    expected: dict

    @property
    def params(self):
        return lora.joined(self.base, self.adapters)

    @property
    def whole(self):
        """The configuration of the base, and of a merged model."""
        return dataclasses.replace(self.config, lora=None)


@functools.cache
def golden(name):
    config, base = hf.load(GOLDEN / name)
    found, adapters = peft.read(GOLDEN / f"{name}_lora", config, "float32:0")
    expected = dict(np.load(GOLDEN / f"{name}_lora" / "expected.npz"))
    return Golden(dataclasses.replace(config, lora=found), base, adapters, expected)


def largest(difference):
    return float(np.max(np.abs(difference)))


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), tree, other)


# The model


@every_architecture
def test_logits_equal_those_of_peft(name):
    own = golden(name)
    assert own.config.lora == Lora(4, 2.0, tuple(lora.matrices(own.config)))
    logits = forward(own.params, own.config, own.expected["ids"])
    assert largest(logits - own.expected["logits"]) <= 1e-4
    without = forward(own.base, own.whole, own.expected["ids"])
    assert largest(without - own.expected["logits"]) > 1


@pytest.mark.parametrize(
    ("name", "remat", "unroll"),
    [
        *((name, "none", False) for name in NAMES),
        ("qwen2_untied", "full", False),
        ("qwen2_untied", "dots", False),
        ("qwen2_untied", "full", True),
        ("qwen3", "none", True),
    ],
)
def test_gradients_equal_those_of_peft(name, remat, unroll):
    own = golden(name)
    ids = own.expected["ids"]

    @jax.jit
    @jax.value_and_grad
    def gradient_of(adapters):
        params = lora.joined(own.base, adapters)
        hidden_BTD = decoder.hidden_states(params, own.config, ids[:, :-1], remat=remat, unroll=unroll)
        logits = hidden_BTD @ decoder.head(params, own.config).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    loss, gradients = gradient_of(own.adapters)
    assert abs(loss - own.expected["loss"]) <= 1e-5
    wanted = _of_peft(own)
    assert len(jax.tree.leaves(wanted)) == 14 and jax.tree.structure(wanted) == jax.tree.structure(gradients)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradients, wanted)), strict=True):
        assert largest(theirs) > 1e-2 and largest(ours - theirs) <= 1e-4


def _of_peft(own):
    """The gradients by the names of PEFT's tensors, in the nesting of the adapters."""
    tree = {}
    for path in own.config.lora.targets:
        module = f"{'self_attn' if 'attention' in path else 'mlp'}.{path.rpartition('/')[2]}_proj"
        for letter, leaf in (("A", lora.A), ("B", lora.B)):
            stack = [
                own.expected[f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight"].T
                for layer in range(own.config.num_layers)
            ]
            shape = functools.reduce(lambda t, part: t[part], (*path.split("/"), leaf), own.adapters).shape
            tree = lora.joined(tree, lora.nested(f"{path}/{leaf}", np.stack(stack).reshape(shape)))
    return tree


@every_architecture
def test_fresh_adapters_add_nothing(name):
    """Bit by bit, whichever way their first factor is drawn."""
    own = golden(name)
    ids = own.expected["ids"]
    for init in ("uniform", "gaussian"):
        fresh = lora.init(jax.random.key(0), own.config, dataclasses.replace(own.config.lora, init=init))
        logits = forward(lora.joined(own.base, fresh), own.config, ids)
        np.testing.assert_array_equal(logits, forward(own.base, own.whole, ids))


def test_fresh_adapters_are_drawn_as_said_and_leave_the_base_as_it_is():
    wide = Lora(16, 1.0, ("layers/attention/o", "layers/mlp/down"))
    config = dataclasses.replace(case.CONFIG, dtype="bfloat16", lora=wide)
    _, base = lora.split(decoder.init(jax.random.key(0), config))
    plain = decoder.init(jax.random.key(0), case.CONFIG)
    assert_same(base, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain))
    for init, deviation in (("uniform", (3 * 64) ** -0.5), ("gaussian", 1 / 16)):
        adapters = lora.init(jax.random.key(0), config, dataclasses.replace(wide, init=init))
        down = adapters["layers"]["mlp"]["down"]
        assert down[lora.A].shape == (2, 64, 16) and down[lora.B].shape == (2, 16, 32)
        assert adapters["layers"]["attention"]["o"][lora.A].shape == (2, 4, 8, 16)
        assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {np.dtype("float32")}
        assert abs(np.std(down[lora.A]) / deviation - 1) < 0.1 and not np.any(down[lora.B])
        assert init == "gaussian" or largest(down[lora.A]) <= 64**-0.5
        assert largest(down[lora.A][0] - down[lora.A][1]) > 0.01


@every_architecture
def test_merged_is_apart(name):
    own = golden(name)
    one = merged(own.params, own.config)
    assert jax.tree.structure(one) == jax.tree.structure(own.base)
    apart = forward(own.params, own.config, own.expected["ids"])
    assert largest(forward(one, own.whole, own.expected["ids"]) - apart) <= 1e-5 * max(1.0, largest(apart))
    of_layers = merged(decoder.unstack_layers(own.params), own.config)
    for leaf, other in zip(
        jax.tree.leaves(of_layers), jax.tree.leaves(decoder.unstack_layers(one)), strict=True
    ):
        np.testing.assert_allclose(leaf, other, atol=1e-6)
    for params in (own.params, decoder.unstack_layers(own.params)):
        laid_out = inference.to_inference_layout(params, own.config)
        for leaf, other in zip(
            *map(jax.tree.leaves, (laid_out, inference.to_inference_layout(one, own.whole))), strict=True
        ):
            np.testing.assert_allclose(leaf, other, atol=1e-6)


def test_a_merged_matrix_is_rounded_once():
    """The sum is one of float32, also where the base is in bfloat16."""
    own = golden("llama")
    config = dataclasses.replace(own.config, dtype="bfloat16")
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), own.base)
    up, factors = base["layers"]["mlp"]["up"]["kernel"], own.adapters["layers"]["mlp"]["up"]
    product = 2.0 * np.einsum("ldr,lrf->ldf", *(np.asarray(factors[name], np.float64) for name in factors))
    kernel = merged(lora.joined(base, own.adapters), config)["layers"]["mlp"]["up"]["kernel"]
    exact = np.asarray(up, np.float64) + product
    assert kernel.dtype == jnp.bfloat16
    assert np.mean(np.asarray(kernel) == exact.astype(jnp.bfloat16)) > 0.999


class Pair(NamedTuple):
    """A leaf that is a tuple by descent, as specs of shardings are in some versions of JAX."""

    one: int
    two: int


def test_split_and_joined_are_inverse():
    own = golden("qwen3")
    for params in (own.params, decoder.unstack_layers(own.params)):
        trained, rest = lora.split(params)
        names = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
        assert names == {"['lora_a']", "['lora_b']"}
        assert len(jax.tree.leaves(trained)) == 14 * (1 if isinstance(trained["layers"], dict) else 2)
        assert_same(lora.joined(rest, trained), params)
        assert_same(lora.joined(trained, rest), params)
    assert_same(lora.split(own.params), (own.adapters, own.base))
    assert lora.split(own.base) == (own.base, {}) and lora.joined({}, own.base) == own.base
    with pytest.raises(ValueError, match="a leaf in common"):
        lora.joined(own.params, own.adapters)
    leaf = Pair(1, 2)
    tree = {"up": {"kernel": leaf, lora.A: leaf, lora.B: leaf}, "norm": {"scale": leaf}}
    trained, rest = {"up": {lora.A: leaf, lora.B: leaf}}, {"up": {"kernel": leaf}, "norm": {"scale": leaf}}
    assert lora.split(tree) == (trained, rest) and lora.joined(rest, trained) == tree


# The rollout


@every_architecture
def test_rollout_logprobs_equal_replayed_ones(name):
    config = dataclasses.replace(CONFIGS[name], lora=Lora(4, 2.0, tuple(lora.matrices(CONFIGS[name]))))
    params = _params(config)
    assert largest(params["layers"]["mlp"]["up"][lora.B]) > 0.1
    written = _generate(params, config, mixing=Mixing(rate=0.5, k=3, until_ids=UNTIL), slots=4, chunk=8)
    assert written.mixed_BT.sum() > 20, "nothing was mixed: the comparison would be empty"
    assert _packed_gap(params, config, written) <= 1e-4


def test_the_neighbour_table_outlives_every_update():
    """None of its parts is made anew under adapters, however young it has to be."""
    config = dataclasses.replace(CONFIGS["qwen2_tied"], lora=Lora(4, 2.0, ("layers/attention/q",)))
    params = _params(config)
    run, state = _fake_run(config, params, refresh_every=1)
    table, found = refresh_table(run, state)
    assert found["table/cost"] == 1.0
    for age in (2, 3):
        before_VD = copy_rows(run, table, params)
        trained, base = lora.split(params)
        params = lora.joined(base, jax.tree.map(lambda x: x + 0.3, trained))
        state = _state(params, add_drift(run, table, before_VD, params))
        former, (table, found) = table, refresh_table(run, state)
        assert before_VD is None and found == {} and table.age == age and table.state is former.state
    fresh = neighbor_table(np.asarray(decoder.table_rows(params, config, "embedding")), 3)
    np.testing.assert_array_equal(neighbors(run, table), fresh)


# The update

ADAPTED = dataclasses.replace(case.CONFIG, lora=Lora(4, 2.0, tuple(lora.matrices(case.CONFIG))))
PLAIN = dataclasses.replace(case.OBJECTIVE, kl_coef=0.0)
GSPO = dataclasses.replace(PLAIN, algorithm="gspo", clip_low=3e-1, clip_high=4e-1)


@functools.cache
def one_update(shape):
    """(state before, state after, metrics) of one optimiser step on a mesh, with a reference model."""
    programs, shardings, optimizer = case.make_programs(
        meshes.make_mesh(*shape, jax.devices()[: math.prod(shape)]), config=ADAPTED
    )
    old, new, ref = (jax.device_put(case.make_params(seed, ADAPTED), shardings.params) for seed in (0, 2, 4))
    batch = case.pack_batch(case.OBJECTIVE, rows=8, share_prompts=True)
    (calls,) = update.compute_logprobs(programs, old, ref, [batch])
    state = update.init_state(new, optimizer)
    before = jax.device_get(state)
    state, (metrics,) = update.update(programs, state, [calls])
    return before, jax.device_get(state), update.batch_metrics([jax.device_get(metrics)])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_an_update_changes_the_adapters_and_nothing_else(shape):
    before, after, metrics = one_update(shape)
    (former, base), (trained, base_after) = lora.split(before.params), lora.split(after.params)
    assert_same(base_after, base)
    moved = jax.tree.map(lambda new, old: largest(new - old), trained, former)
    assert len(jax.tree.leaves(moved)) == 14 and min(jax.tree.leaves(moved)) > 5e-4
    assert metrics["learner/skipped"] == 0 and metrics["learner/kl"] > 0
    for name in ("mu", "nu"):
        moments = optax.tree.get(after.opt_state, name)
        assert jax.tree.structure(moments) == jax.tree.structure(trained)
    shapes = [leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert sorted(shapes) == sorted(leaf.shape for leaf in 2 * jax.tree.leaves(trained))


def test_the_base_waits_on_the_host_and_the_numbers_stay():
    """`train.offload` "reference": the base lies there, and `Run.on_devices` brings it back."""
    before, expected, _ = one_update((1, 1, 1))
    programs, shardings, _ = case.make_programs(config=ADAPTED, offload="reference")
    run = types.SimpleNamespace(learner=types.SimpleNamespace(programs=programs))
    trained, base = lora.split(jax.device_put(before.params, shardings.params))
    kept = update.TrainState(lora.joined(programs.base_offload.to_host(base), trained), None)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(lora.split(kept.params)[1])}
    assert kinds == {"pinned_host"}
    params = Run.on_devices(run, kept.params)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)} == {"device"}
    assert_same(params, before.params)
    again = kept.changed_to(expected.changing)
    assert_same(again.params, expected.params)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(lora.split(again.params)[1])}
    assert kinds == {"pinned_host"} and not programs.reference_offload.enabled


def test_the_first_moment_may_be_bfloat16():
    optimizer = make_optimizer(dataclasses.replace(case.OPTIMIZER, moments_dtype="bfloat16"))
    state = optimizer.init({"lora_a": jnp.ones((3, 2))})
    moments = [optax.tree.get(state, name)["lora_a"].dtype for name in ("mu", "nu")]
    assert moments == [jnp.bfloat16, jnp.float32]


def test_eight_devices_equal_one():
    expected, got = one_update((1, 1, 1)), one_update((2, 2, 2))
    moments = [optax.tree.get(state.opt_state, "mu") for _, state, _ in (got, expected)]
    case.assert_same_step(moments[0], got[2], (moments[1], expected[2]))
    for name in ("learner/kl", "learner/grad_norm", "learner/update_norm"):
        np.testing.assert_allclose(got[2][name], expected[2][name], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), got[1].params, expected[1].params)


@pytest.mark.parametrize("objective", [PLAIN, GSPO], ids=["grpo", "gspo"])
def test_gradients_are_those_of_the_merged_matrices_by_the_chain_rule(objective):
    """dA = s · dW · Bᵀ and dB = s · Aᵀ · dW, with dW the gradient of a model that is trained whole."""
    given = {"objective": objective, "old": "sampler", "row_tokens": 128}
    trained, _ = lora.split(case.make_params(2, ADAPTED))
    grads, metrics, *_ = case.step_gradients(config=ADAPTED, **given)
    one = lora.merged(case.make_params(2, ADAPTED), ADAPTED)
    whole, of_whole = _gradients_of(one, **given)
    expected = {}
    for path in ADAPTED.lora.targets:
        pair, kernel = (_at(tree, path) for tree in (trained, whole))
        a, b = pair[lora.A], pair[lora.B]
        flat = jnp.reshape(kernel["kernel"], (2, math.prod(a.shape[1:-1]), math.prod(b.shape[2:])))
        rows, columns = a.reshape(2, -1, 4), b.reshape(2, 4, -1)
        to_a = 2.0 * jnp.einsum("lio,lro->lir", flat, columns, precision="highest")
        to_b = 2.0 * jnp.einsum("lir,lio->lro", rows, flat, precision="highest")
        leaf = {lora.A: np.asarray(to_a.reshape(a.shape)), lora.B: np.asarray(to_b.reshape(b.shape))}
        expected = lora.joined(expected, lora.nested(path, leaf))
    case.assert_same_step(grads, metrics, (expected, of_whole))


def _at(tree, path):
    return functools.reduce(lambda part, name: part[name], path.split("/"), tree)


def _gradients_of(params, objective, old, row_tokens):
    """Gradients and metrics of a step that trains all of `params`."""
    programs, shardings, _ = case.make_programs(objective=objective)
    batch = case.pack_batch(objective, row_tokens)
    params = jax.device_put(params, shardings.params)
    (calls,) = update.compute_logprobs(programs, params, None, [batch], old=old)
    sums = jax.device_get(update.gradients(programs, params, calls))
    return sums.gradient, update.batch_metrics([sums.metrics])


# Sizes that no activation has.
ODD = dataclasses.replace(case.CONFIG, vocab_size=104, hidden_size=36, head_dim=10, intermediate_size=72)


@pytest.mark.parametrize("adapters", [True, False])
def test_the_base_has_no_gradient_in_the_compiled_program(adapters):
    """Nothing of the shape of one of its matrices is computed; where all is trained, each of them is."""
    config = dataclasses.replace(ODD, lora=ADAPTED.lora if adapters else None)
    programs, shardings, _ = case.make_programs(config=config, objective=PLAIN)
    (rows,) = case.pack_batch(PLAIN, rows=16)
    params = jax.device_put(case.make_params(2, config), shardings.params)
    given = programs.shard([rows])
    given = given._replace(old_logprobs_MRT=given.rows.sampler_logprobs_RT)
    program = programs.accumulate.lower(programs.zeros(params, given), params, given).compile()
    computed = _computed_shapes(program.as_text())
    found = {name: shapes & computed for name, shapes in _shapes_of_base().items()}
    assert not any(found.values()) if adapters else all(found.values()), found


def _shapes_of_base():
    """Path of each weight of the base -> the shapes in which its gradient could be."""
    shapes = {"embed": {(104, 36), (36, 104)}, "head": {(104, 36), (36, 104)}}
    for path, (inputs, outputs) in lora.matrices(ODD).items():
        two = math.prod(inputs), math.prod(outputs)
        each = {two, two[::-1], (*inputs, *outputs), (*outputs, *inputs)}
        shapes[path] = each | {(n, *shape) for shape in each for n in (1, 2)}
    return shapes


def _computed_shapes(text):
    """The float32 shapes of what a compiled program computes: of all but fusions, and moves of what is there.

    What a fusion computes is listed on its own.
    """
    moves = {"parameter", "get-tuple-element", "bitcast", "copy", "transpose", "dynamic-slice", "slice"}
    found = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", text)
    return {tuple(map(int, dims.split(","))) for dims, opcode in found if opcode not in moves | {"fusion"}}


# Directories of PEFT


@every_architecture
def test_save_and_read_are_exact(name, tmp_path):
    own = golden(name)
    folder = tmp_path / "adapter"
    peft.save(folder, own.config, own.adapters, base=arithmetic.TOKENIZER, fingerprint="float32:1")
    tensors, config = _stored(folder)
    theirs, of_theirs = _stored(GOLDEN / f"{name}_lora")
    assert_same(tensors, theirs)
    assert set(config["target_modules"]) == set(of_theirs["target_modules"])
    for key in config.keys() - {"target_modules", "base_model_name_or_path"}:
        assert config[key] == of_theirs[key], key
    assert config["base_model_name_or_path"] == str(arithmetic.TOKENIZER)
    assert (folder / "tokenizer.json").is_file()
    found, again = peft.read(folder, own.whole, "float32:1")
    assert found == own.config.lora == peft.check(folder, own.whole)
    assert_same(again, own.adapters)


def test_some_matrices_and_another_scale_are_read_as_they_were_saved(tmp_path):
    own = golden("llama")
    some = Lora(3, 5 / 3, lora.find_targets(own.config, "(q|down)/kernel"))
    config = dataclasses.replace(own.config, lora=some)
    adapters = jax.device_get(lora.init(jax.random.key(0), config, some))
    assert some.targets == ("layers/attention/q", "layers/mlp/down")
    peft.save(tmp_path / "adapter", config, adapters, base=arithmetic.TOKENIZER, fingerprint="float32:1")
    found, again = peft.read(tmp_path / "adapter", own.whole, "bfloat16:2")
    assert (found.rank, found.targets) == (3, some.targets) and math.isclose(found.scale, 5 / 3)
    assert_same(again, adapters)


def test_rank_stabilised_scaling_is_read(tmp_path):
    folder = _edited(tmp_path, use_rslora=True)
    assert peft.check(folder, golden("llama").whole).scale == 8 / 4**0.5


def _stored(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors"), config


def _edited(tmp_path, change=None, **keys):
    """A copy of llama's adapter with keys of its configuration, or tensors, changed."""
    folder = tmp_path / "edited"
    shutil.copytree(GOLDEN / "llama_lora", folder)
    tensors, config = _stored(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))
    if change is not None:
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# What is refused


def _refused(match, function, *given):
    with pytest.raises(UserError, match=match) as refusal:
        function(*given)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def _settings(**changes):
    config = base_config.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return resolve(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora__rank": 0}, r"lora\.rank is 0"),
        ({"lora__rank": 4, "lora__targets": "(q"}, r"lora\.targets is '\(q'.*regular expression"),
        ({"lora__rank": 4, "lora__alpha": 0.0}, r"lora\.alpha is 0"),
        ({"lora__rank": 4, "lora__init": "pissa"}, r"lora\.init is 'pissa'"),
        ({"lora__rank": 4, "lora__scaling": "none"}, r"lora\.scaling is 'none'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, sentence):
    _refused(sentence, lambda: _settings(**changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora__rank": 17}, r"lora\.rank is 17, but layers/attention/k/kernel is 48 × 16; .* at most 16"),
        (
            {"lora__rank": 4, "lora__targets": "query"},
            r"lora\.targets 'query' matches no matrix; .* layers/attention/q/kernel, .*mlp/down/kernel",
        ),
        (
            {"lora__rank": 4, "lora__targets": "embed"},
            r"lora\.targets 'embed' takes in embed/embedding, which",
        ),
        (
            {"lora__rank": 4, "lora__targets": "head|mlp"},
            r"lora\.targets 'head\|mlp' takes in head/rows, which",
        ),
        ({"lora__rank": 4, "lora__targets": "."}, r"takes in embed/embedding and head/rows, which has no"),
    ],
)
def test_adapters_that_a_model_cannot_have_are_refused_by_name(changes, sentence):
    _refused(sentence, as_trained, golden("llama").whole, _settings(**changes))


def test_settings_name_matrices_rank_and_scale():
    whole = golden("llama").whole
    own = as_trained(whole, _settings(lora__rank=16, lora__targets="mlp", model__dtype="float32"))
    assert own == dataclasses.replace(whole, lora=Lora(16, 2.0, tuple(lora.matrices(whole))[4:]))
    own = as_trained(whole, _settings(lora__rank=4, lora__targets="attention", lora__scaling="rslora"))
    assert own.lora == Lora(4, 16.0, tuple(lora.matrices(whole))[:4])
    assert as_trained(whole, _settings()).lora is None


def _without(name):
    return lambda tensors: tensors.pop(f"base_model.model.model.layers.1.{name}.weight")


def _with(**more):
    return lambda tensors: tensors.update(more)


_UP = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "keys", "sentence"),
    [
        (None, {"use_dora": True}, "has use_dora True, which is not built"),
        (None, {"bias": "all"}, "has bias 'all', which is not built"),
        (None, {"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\], which is not built"),
        (None, {"rank_pattern": {"q_proj": 8}}, r"has rank_pattern \{'q_proj': 8\}, which is not built"),
        (None, {"alpha_pattern": {"q_proj": 8}}, r"has alpha_pattern \{'q_proj': 8\}, which is not built"),
        (None, {"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', which is not built"),
        (None, {"kasa_config": {"beta": 1e-4}}, "has kasa_config .*, which is not built"),
        (None, {"peft_type": "LOHA", "use_dora": True}, "has peft_type 'LOHA', use_dora True, which is not"),
        (None, {"r": 0}, r"adapter_config\.json has r 0 and lora_alpha 8"),
        (None, {"r": 5}, r"lora_A\.weight has shape \[4, 48\], not \[5, 48\]"),
        (_without("mlp.up_proj.lora_B"), {}, r"layers\.1\.mlp\.up_proj\.lora_B\.weight is missing"),
        (_with(**{"lm_head.lora_A.weight": np.ones(1)}), {}, r"lm_head\.lora_A\.weight is no factor"),
        (_with(**{_UP: np.full((80, 4), np.nan)}), {}, r"lora_B of mlp\.up_proj in .* not finite: fetch"),
        (dict.clear, {}, r"does not fit this model \(it is empty\)"),
    ],
)
def test_an_adapter_that_is_not_plain_or_not_whole_is_refused_by_name(tmp_path, change, keys, sentence):
    folder = _edited(tmp_path, change, **keys)
    assert str(folder) in _refused(sentence, peft.read, folder, golden("llama").whole, "float32:0")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    own = golden("llama")
    sentence = (
        r"q_proj\.lora_B\.weight has shape \[48, 4\], not \[80, 4\].* and \d+ more\); give the base model"
    )
    _refused(sentence, peft.check, GOLDEN / "llama_lora", golden("qwen3").whole)
    folder = tmp_path / "adapter"
    peft.save(folder, own.config, own.adapters, base=arithmetic.TOKENIZER, fingerprint="bfloat16:1")
    sentence = f"{folder} was trained on another base model; name that one by model.path"
    _refused(sentence, peft.read, folder, own.whole, "bfloat16:2")
    peft.read(folder, own.whole, "bfloat16:1")
    peft.read(folder, own.whole, "float32:2")  # the digest of another dtype says nothing


def test_directories_that_are_no_adapters_are_refused(tmp_path):
    whole = golden("llama").whole
    _refused("nowhere is no directory; model.adapter names", peft.check, tmp_path / "nowhere", whole)
    _refused("has no adapter_config.json: it is no adapter", peft.check, GOLDEN / "llama", whole)
    folder = _edited(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    _refused("adapter_model.safetensors is broken or half-downloaded", peft.check, folder, whole)
    shutil.copytree(GOLDEN / "llama", tmp_path / "both")
    shutil.copy(GOLDEN / "llama_lora" / "adapter_config.json", tmp_path / "both")
    sentence = r"both holds adapter_config\.json, an adapter; name its directory by model\.adapter, and"
    _refused(sentence, hf.read_config, tmp_path / "both")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora__rank": 8, "lora__alpha": 16.0}, "has rank 4, the settings 8; set lora.rank, lora.alpha and"),
        ({"lora__rank": 4, "lora__alpha": 16.0}, r"has scale 2\.0, the settings 4\.0; set lora.rank"),
        ({"lora__rank": 4, "lora__alpha": 8.0, "lora__targets": "mlp"}, "has targets .*, the settings "),
    ],
)
def test_an_adapter_that_is_not_as_the_settings_say_is_refused(changes, sentence):
    settings = _settings(model__adapter=str(GOLDEN / "llama_lora"), **changes)
    config = as_trained(golden("llama").whole, settings)
    assert "llama_lora" in _refused(sentence, locate_adapter, settings, config)


def test_an_adapter_as_the_settings_say_is_found_and_one_may_be_merged_without_settings():
    folder = str(GOLDEN / "llama_lora")
    for changes in ({"lora__rank": 4, "lora__alpha": 8.0}, {}):
        settings = _settings(model__adapter=folder, **changes)
        assert locate_adapter(settings, as_trained(golden("llama").whole, settings)) == folder
    assert locate_adapter(_settings(), golden("llama").whole) is None


def test_merging_is_refused_where_there_are_no_adapters(tmp_path):
    config = pathlib.Path(base_config.__file__)
    argv = ["export", f"--config={config}", f"--workdir={tmp_path}", "--merge"]
    _refused(r"--merge is of runs with lora\.rank; this one has none", export.main, argv)
