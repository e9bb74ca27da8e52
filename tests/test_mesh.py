"""The mesh and the sharding table: sizes, every parameter's rule, what is refused and by which name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ngrpo_jax.errors import UserError
from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.runtime import mesh as meshes

V, D, L, N, K, H, F = 64, 16, 3, 4, 2, 8, 32


def _params(**changes):
    """Every leaf of the canonical stacked layout, of zeros."""
    layers = {
        "input_norm": {"scale": (L, D)},
        "post_attention_norm": {"scale": (L, D)},
        "attention": {
            "q": {"kernel": (L, D, N, H), "bias": (L, N, H)},
            "k": {"kernel": (L, D, K, H), "bias": (L, K, H)},
            "v": {"kernel": (L, D, K, H), "bias": (L, K, H)},
            "q_norm": {"scale": (L, H)},
            "k_norm": {"scale": (L, H)},
            "o": {"kernel": (L, N, H, D)},
        },
        "mlp": {"gate": {"kernel": (L, D, F)}, "up": {"kernel": (L, D, F)}, "down": {"kernel": (L, F, D)}},
    }
    shapes = {"embed": {"embedding": (V, D)}, "layers": layers, "final_norm": {"scale": (D,)}}
    shapes |= {"head": {"rows": (V, D)}} | changes
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))


def _unstacked(params):
    return params | {
        "layers": tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(L))
    }


def _specs(shardings):
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {meshes.path_name(path): sharding.spec for path, sharding in leaves}


def test_all_axes_are_auto_and_hold_every_device_once():
    mesh = meshes.make_mesh(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    assert meshes.make_mesh(1, 1, 1, jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [(2, 2, 1), (4, 4, 1), (0, 8, 1)])
def test_sizes_that_do_not_fit_are_refused_by_name(sizes):
    with pytest.raises(ValueError, match=r"mesh\.") as refusal:
        meshes.make_mesh(*sizes)
    names = ("mesh.data",) if 0 in sizes else ("mesh.data", "mesh.fsdp", "mesh.tensor", "8 devices")
    assert all(name in str(refusal.value) for name in names)


def test_learner_layout_splits_vocabulary_heads_and_width():
    specs = _specs(meshes.param_shardings(meshes.make_mesh(2, 2, 2), _params()))
    assert specs["embed/embedding"] == specs["head/rows"] == P("tensor", "fsdp")
    assert specs["layers/attention/q/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["layers/attention/k/bias"] == P(None, "tensor", None)
    assert specs["layers/attention/o/kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["layers/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert specs["layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    for name in ("final_norm/scale", "layers/input_norm/scale", "layers/attention/q_norm/scale"):
        assert set(specs[name]) <= {None}


def test_rollout_layouts_split_over_tensor_alone_or_not_at_all():
    mesh = meshes.make_mesh(2, 2, 2)
    config = ModelConfig("qwen2", V, D, F, L, N, K, H, tie_embeddings=False)
    params = jax.eval_shape(
        lambda: inference.to_inference_layout(decoder.init(jax.random.key(0), config), config)
    )
    specs = _specs(meshes.param_shardings(mesh, params, layout="tensor"))
    assert specs["layers/1/attention/qkv/kernel"] == P("tensor", None, None, None)
    assert specs["layers/1/mlp/down/kernel"] == P(None, "tensor")
    assert specs["embed/embedding"] == specs["head/rows"] == P("tensor", None)
    whole = meshes.param_shardings(mesh, params, layout="replicated")
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(whole))
    with pytest.raises(ValueError, match="sideways"):
        meshes.param_shardings(mesh, params, layout="sideways")


def test_every_split_is_real():
    """Placed on the mesh, a device holds exactly the share that the rule gives it."""
    mesh, params = meshes.make_mesh(2, 2, 2), _params()
    placed = jax.device_put(params, meshes.param_shardings(mesh, params))
    q = placed["layers"]["attention"]["q"]["kernel"]
    assert q.addressable_shards[0].data.shape == (L, D // 2, N // 2, H)
    assert placed["embed"]["embedding"].addressable_shards[0].data.shape == (V // 2, D // 2)


def test_a_path_without_a_rule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"adapter/kernel .*no sharding rule"):
        meshes.param_shardings(meshes.make_mesh(8, 1, 1), _params(adapter={"kernel": (2, 2)}))


@pytest.mark.parametrize(
    ("sizes", "changes", "words"),
    [
        ((2, 1, 4), {}, ("layers/attention/k/", "2 key/value heads (K)", "mesh.tensor = 4")),
        ((1, 8, 1), {"head": {"rows": (V, 12)}}, ("head/rows", "12 model width (D)", "mesh.fsdp = 8")),
    ],
)
def test_a_dimension_that_the_axis_does_not_divide_is_refused_by_name(sizes, changes, words):
    with pytest.raises(ValueError, match="does not divide") as refusal:
        meshes.param_shardings(meshes.make_mesh(*sizes), _params(**changes))
    assert all(word in str(refusal.value) for word in words)


def test_a_vocabulary_that_the_axis_does_not_divide_is_split_over_width_alone():
    specs = _specs(meshes.param_shardings(meshes.make_mesh(2, 2, 2), _params(head={"rows": (63, D)})))
    assert specs["head/rows"] == P(None, "fsdp") and specs["embed/embedding"] == P("tensor", "fsdp")


def test_a_leaf_of_another_rank_is_refused():
    with pytest.raises(ValueError, match=r"final_norm/scale has shape \(2, 16\)"):
        meshes.param_shardings(meshes.make_mesh(8, 1, 1), _params(final_norm={"scale": (2, D)}))


def test_optimiser_state_follows_the_parameters():
    mesh, params = meshes.make_mesh(2, 2, 2), _params()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    specs = _specs(meshes.state_shardings(mesh, state))
    of_params = _specs(meshes.param_shardings(mesh, params))
    for name, spec in of_params.items():
        matching = [found for path, found in specs.items() if path.endswith("/" + name)]
        assert matching == [spec] * 3, name  # the parameter itself and both moments
    assert len(specs) == 3 * len(of_params) + 2  # and two counters
    assert specs["step"] == P()


def test_other_arrays_of_the_state_are_refused():
    mesh = meshes.make_mesh(2, 2, 2)
    state = {"params": {"final_norm": {"scale": jnp.zeros(D)}}, "table_VC": jnp.zeros((V, 3), jnp.int32)}
    with pytest.raises(ValueError, match="table_VC"):
        meshes.state_shardings(mesh, state)


def test_rows_are_split_over_data_and_fsdp():
    mesh = meshes.make_mesh(2, 2, 2)
    rows = jax.device_put(np.arange(24.0).reshape(8, 3), meshes.rows_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
    assert meshes.replicated(mesh).is_fully_replicated


def test_a_mesh_that_a_slice_cannot_have_is_refused_with_its_sizes(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("failed to find an assignment")

    monkeypatch.setattr(meshes.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(UserError, match=r"cannot have mesh.data 2 × mesh.fsdp 2 × mesh.tensor 2 \(failed"):
        meshes.make_mesh(2, 2, 2)
