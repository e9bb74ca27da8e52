"""Attention over the columns that rows hold: the kernels, interpreted, against attention over all columns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_rollout import BASE, CONFIGS, STRATEGIES, UNTIL, _generate, _packed_gap, _params, _same

from ngrpo_jax import choices
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.errors import UserError
from ngrpo_jax.model import cache as kv
from ngrpo_jax.model import inference, ring_attention
from ngrpo_jax.model.cached_attention import attend_to_valid
from ngrpo_jax.model.inference import InferenceModel
from ngrpo_jax.preflight import fit
from ngrpo_jax.rollout import decode, programs
from ngrpo_jax.rollout.sharding import ONE_DEVICE, SlotSharding
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import RolloutSettings, Settings

COLUMNS = 512
LENGTHS = np.array([0, 5, 130, 255, 300, 511, 512, 260], np.int32)  # a full row holds the cursor's column
CURSORS = (0, 127, 300, 511)
PLATFORMS = ("tpu", "gpu")


def _case(dtype):
    """Queries, keys and values of 8 rows with 4 key/value heads of 3 query heads."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (8, 4, 3, 64), (8, 4, 64, COLUMNS), (8, 4, COLUMNS, 64)
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return q, k, v * 0.25


def _by_kernel(platform, sharding=ONE_DEVICE):
    """(q, keys, values, lengths, cursor) -> attention, as a decode step has it."""
    model = InferenceModel(dataclasses.replace(BASE, head_dim=64), platform, "ring")

    @jax.jit
    def attend(q, keys, values, lengths, cursor):
        cache = kv.KVCache((keys,), (values,), lengths, cursor)
        return decode.held_attention(model, cache, sharding)(q, keys, values)

    return attend


@jax.jit
def _over_all(q, keys, values, lengths, cursor):
    valid = kv.valid_columns(lengths, cursor, COLUMNS)
    return attend_to_valid(q, keys, values, valid_BS=valid, platform="gpu")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_the_kernel_is_attention_over_what_rows_hold(platform, dtype, near):
    """Ragged lengths, an empty row, full rows, the cursor anywhere: rows wrap round the end of the ring."""
    arrays, attend = _case(dtype), _by_kernel(platform)
    for cursor in CURSORS:
        found = attend(*arrays, LENGTHS, np.int32(cursor))
        expected = _over_all(*arrays, LENGTHS, np.int32(cursor))
        assert found.dtype == expected.dtype == dtype
        np.testing.assert_allclose(found.astype("float32"), expected.astype("float32"), rtol=0, atol=near)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_kernel_runs_on_each_device_over_its_rows_and_heads(platform):
    mesh = meshes.make_mesh(2, 2, 2)
    sharding = SlotSharding(mesh, ("data", "fsdp"), "tensor")
    arrays = _case("float32")
    placed = [jax.device_put(array, NamedSharding(mesh, P(sharding.rows, "tensor"))) for array in arrays]
    lengths = jax.device_put(LENGTHS, NamedSharding(mesh, P(sharding.rows)))
    found = _by_kernel(platform, sharding)(*placed, lengths, np.int32(127))
    np.testing.assert_allclose(found, _over_all(*arrays, LENGTHS, np.int32(127)), rtol=0, atol=1e-5)
    assert found.sharding.spec == P(sharding.rows, "tensor")


def _visited(lengths, cursor, columns, width):
    """(row, block) of every visit, by the kernel's grid and index map."""
    visited = ring_attention.visits(jnp.asarray(lengths), jnp.int32(cursor), columns=columns, width=width)
    count = int(visited.count_1[0])
    return list(zip(visited.row_I[:count].tolist(), visited.block_I[:count].tolist(), strict=True))


@pytest.mark.parametrize("cursor", CURSORS)
def test_the_blocks_that_hold_a_token_are_visited_once_each_row_after_row(cursor):
    valid = np.asarray(kv.valid_columns(jnp.asarray(LENGTHS), jnp.int32(cursor), COLUMNS))
    held = np.argwhere(valid.reshape(len(LENGTHS), -1, 128).any(axis=2))
    found = _visited(LENGTHS, cursor, COLUMNS, 128)
    assert sorted(found) == [tuple(pair) for pair in held.tolist()]
    assert [row for row, _ in found] == sorted(row for row, _ in found)
    first = {row: block for row, block in reversed(found)}
    assert set(first.values()) == {cursor // 128}, "the kernel begins a row anew at the cursor's block"


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_blocks_are_left_out_where_half_of_the_cache_is_held(seed):
    """32 slots of 8192 columns, half of which are held."""
    width = ring_attention.block_width("tpu", 128, 8192)
    lengths = np.random.default_rng(seed).permutation(np.linspace(0, 8192, 32).astype(np.int32))
    assert abs(lengths.sum() / (32 * 8192) - 0.5) < 0.01
    assert len(_visited(lengths, 5000, 8192, width)) <= 0.65 * 32 * 8192 / width


def test_rings_are_cut_where_a_kernel_takes_them():
    assert ring_attention.block_width("cpu", 128, 1024) is None
    assert ring_attention.block_width("tpu", 80, 1024) is None
    assert [ring_attention.block_width("tpu", 128, columns) for columns in (1000, 1152, 1536)] == [
        None,
        128,
        512,
    ]
    config = dataclasses.replace(BASE, head_dim=128)
    for platform in PLATFORMS:
        for capacity in (40, 1000, 2500, 9000):
            (columns,) = programs.cache_sizes(capacity, InferenceModel(config, platform, "ring"))
            assert capacity <= columns <= max(capacity + 127, capacity * 17 / 16)
            assert ring_attention.block_width(platform, 128, columns)
    assert len(programs.cache_sizes(9000, InferenceModel(config, "tpu", "plain"))) == 6


def test_a_kernel_attends_where_it_is_asked_for_and_by_default_on_tpu():
    chosen = {
        (platform, attention): InferenceModel(BASE, platform, attention).ring
        for platform in ("cpu", *PLATFORMS)
        for attention in choices.DECODE_ATTENTION
    }
    assert {key for key, ring in chosen.items() if ring} == {
        ("cpu", "ring"),
        ("tpu", "ring"),
        ("gpu", "ring"),
        ("tpu", "auto"),
    }


def test_a_kernel_that_the_platform_lacks_is_refused_by_the_setting_s_name():
    settings, devices = Settings(rollout=RolloutSettings(attention="ring")), meshes.make_mesh(8, 1, 1)
    with pytest.raises(UserError, match=r"rollout\.attention is 'ring', but on cpu no kernel .* heads of 8"):
        fit.check_decode_attention(settings, BASE, devices)
    fit.check_decode_attention(Settings(), BASE, devices)


def _use_kernel(platform, monkeypatch):
    """Rollouts of the small models on a CPU take this platform's kernel from here on."""
    monkeypatch.setattr(ring_attention, "HEAD_DIMS", {platform: (8,)})
    monkeypatch.setattr(ring_attention, "WIDTHS", {platform: (16,)})
    monkeypatch.setattr(
        programs, "InferenceModel", lambda config, *_: InferenceModel(config, platform, "ring")
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_replays_exactly_with_the_kernel(name, monkeypatch):
    """Rings of 64 columns that four slots write round, and rows of every length."""
    _use_kernel("tpu", monkeypatch)
    config = CONFIGS["qwen2_untied"]
    params = _params(config)
    mixing = dataclasses.replace(STRATEGIES[name], rate=0.5, until_ids=UNTIL)
    written = _generate(params, config, mixing=mixing, slots=4, chunk=8)
    assert written.mixed_BT.sum() > 20, "nothing was mixed: the comparison would be empty"
    assert _packed_gap(params, config, written) <= 1e-4


@pytest.mark.parametrize("platform", PLATFORMS)
def test_rollouts_with_the_kernel_write_what_others_do_on_one_device_and_on_eight(platform, monkeypatch):
    config = dataclasses.replace(BASE, vocab_size=98, tie_embeddings=False)
    params, mixing = _params(config), Mixing(rate=0.3, k=3, until_ids=UNTIL)
    options = dict(mixing=mixing, table_VC=neighbor_table(params["embed"]["embedding"], 3))
    plain = _generate(params, config, **options)
    _use_kernel(platform, monkeypatch)
    _same(plain, _generate(params, config, **options, slots=4, chunk=8))
    mesh = meshes.make_mesh(2, 2, 2)
    laid_out = inference.to_inference_layout(params, config)
    placed = jax.device_put(laid_out, meshes.param_shardings(mesh, laid_out, layout="tensor"))
    options["table_VC"] = jax.device_put(options["table_VC"], meshes.replicated(mesh))
    sharding = meshes.slots_sharding(mesh, "tensor")
    _same(plain, _generate(placed, config, **options, sharding=sharding, slots=8, chunk=8))
