"""The table of a run: exact resume with its bounds, whose rows it follows, and what runs need none."""

import dataclasses
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_commands import _run, _timeless
from test_rollout import CONFIGS, _params

from ngrpo_jax import train
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.algo.neighbors.eligibility import eligible_rows
from ngrpo_jax.run import loop
from ngrpo_jax.run.neighbor_table import add_drift, copy_rows, neighbors, refresh_table
from ngrpo_jax.run.state import RunState, save
from ngrpo_jax.runtime import mesh


def test_a_resumed_run_has_the_same_table_and_bounds_bit_by_bit(tmp_path, monkeypatch, capsys):
    """Stopped between two refreshes, when the bounds have moved and the table is older than its matrix."""
    whole, resumed, saved = tmp_path / "whole", tmp_path / "resumed", {}

    def saves_in(workdir):
        def save_and_keep(state, run, checkpoints, row):
            save(state, run, checkpoints, row)
            saved[workdir, state.step] = jax.device_get(state.table)
            if workdir == whole and state.step == 2:
                checkpoints.wait()
                shutil.copytree(whole, resumed)

        return save_and_keep

    changes = dict(train__steps=5, checkpoint__every=2, eval__every=50, mixing__refresh_every=3)
    spelled = dict(mixing__distinct_spelling=True, optimizer__learning_rate=1e-4)
    for workdir in (whole, resumed):
        monkeypatch.setattr(loop, "save", saves_in(workdir))
        _run(train, workdir, **changes, **spelled)
    assert "resumed from step 2" in capsys.readouterr().out
    table = saved[whole, 2]
    assert table.age == 2 and 0 < table.state.bounds.drift_V.max() < np.inf
    for step, age in ((4, 1), (5, 2)):
        ours, theirs = saved[resumed, step], saved[whole, step]
        assert ours.age == theirs.age == age
        jax.tree.map(np.testing.assert_array_equal, ours.state, theirs.state)
    rows = _timeless(resumed / "metrics.jsonl")
    assert rows == _timeless(whole / "metrics.jsonl")
    costs = [row.get("table/cost") for row in rows]
    assert costs[0] == 1.0 and [cost is None for cost in costs] == [False, True, True, False, True]
    assert costs[3] < 1.0, "everything was built anew: equality says nothing of the bounds"


def _fake_run(config, params, strategy="neighbor", model_spec="embedding", refresh_every=1, devices=None):
    """As much of a run as the table asks for, and its start."""
    mixing = Mixing(strategy=strategy, k=3, table=model_spec)
    settings = types.SimpleNamespace(
        mixing=types.SimpleNamespace(active=True, refresh_every=refresh_every, table=model_spec)
    )
    tokenizer_info = types.SimpleNamespace(mixing=mixing, eligible=eligible_rows(config.vocab_size, 3))
    of_model = types.SimpleNamespace(config=config, tokenizer_info=tokenizer_info)
    devices = devices or mesh.make_mesh(1, 1, 1, jax.devices()[:1])
    parts = dict(settings=settings, model_spec=of_model, mesh=devices)
    run = types.SimpleNamespace(**parts, on_devices=lambda params: params)
    return run, _state(params, None)


def _state(params, table):
    return RunState(0, types.SimpleNamespace(params=params), table, {})


@pytest.mark.parametrize("model_spec", ["embedding", "head"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 4, 2)])
def test_a_run_keeps_the_table_of_the_matrix_that_its_settings_name(model_spec, grid, caplog):
    """On one device and split over eight; the update donates the parameters, as the learner does."""
    config = dataclasses.replace(CONFIGS["qwen2_untied"], vocab_size=96)
    devices = mesh.make_mesh(*grid, jax.devices()[: np.prod(grid)])
    params = _params(config)
    placed = mesh.param_shardings(devices, params)
    params = jax.device_put(params, placed)
    run, state = _fake_run(config, params, model_spec=model_spec, devices=devices)
    moved = lambda tree: jax.tree.map(lambda x: x + 1e-3 * jnp.sin(1e3 * x), tree)  # noqa: E731
    update, costs = jax.jit(moved, donate_argnums=0, out_shardings=placed), []
    caplog.set_level("WARNING", logger="jax")
    jax.clear_caches()
    for _ in range(3):
        with jax.log_compiles():
            table, metrics = refresh_table(run, state)
        costs.append(metrics["table/cost"])
        rows = params["embed"]["embedding"] if model_spec == "embedding" else params["head"]["rows"]
        np.testing.assert_array_equal(neighbors(run, table), neighbor_table(np.asarray(rows), 3))
        before_VD = copy_rows(run, table, params)
        params = update(params)
        with jax.log_compiles():
            state = _state(params, add_drift(run, table, before_VD, params))
    assert costs[0] == 1.0 and max(costs[1:]) < 1.0
    compiled = re.findall(r"Finished XLA compilation of jit\((_refresh|_add_drift)\)", caplog.text)
    assert sorted(compiled) == ["_add_drift", "_refresh"]


def test_between_refreshes_the_table_is_the_old_one_and_its_bounds_go_on():
    config = CONFIGS["qwen2_tied"]
    params = _params(config)
    run, state = _fake_run(config, params, refresh_every=2)
    ages, tables = [], []
    for _ in range(4):
        table, metrics = refresh_table(run, state)
        ages.append((table.age, bool(metrics)))
        tables.append(np.asarray(neighbors(run, table)))
        before_VD = copy_rows(run, table, params)
        params = jax.tree.map(lambda x: x + 0.3 * jnp.sin(1e3 * x), params)
        state = _state(params, add_drift(run, table, before_VD, params))
    assert ages == [(1, True), (2, False), (1, True), (2, False)]
    assert (tables[0] == tables[1]).all() and (tables[2] == tables[3]).all()
    assert (tables[1] != tables[2]).any()


@pytest.mark.parametrize("strategy", ["soft", "gumbel", "noise"])
def test_strategies_without_a_table_keep_and_copy_nothing(strategy):
    config = CONFIGS["qwen2_tied"]
    run, state = _fake_run(config, {}, strategy=strategy)
    assert refresh_table(run, state) == (None, {}) and neighbors(run, None) is None
    assert copy_rows(run, None, {}) is None and add_drift(run, None, None, {}) is None
