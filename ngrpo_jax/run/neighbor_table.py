"""The neighbour table of a training run: refreshed before a rollout, told of every update after it.

Owns whose rows it is about, when it is refreshed, and what that has cost. Must not know how a table is made
or why it may be trusted (algo/refresh.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.neighbors import refresh
from ngrpo_jax.model import decoder
from ngrpo_jax.run.state import Run, RunState
from ngrpo_jax.setup.policy import table_config


class Serving(NamedTuple):
    """The table of one rollout."""

    state: refresh.TableState
    table_VC: jax.Array
    age: int  # rollouts that it has served, this one included
    figures: dict[str, float]  # what a refresh has cost; empty where there was none


def serve(run: Run, state: RunState) -> Serving | None:
    """The table to mix by, refreshed every `mixing.refresh_every` rollouts; None where none is needed."""
    mixing = run.settings.mixing
    if not (mixing.active and run.model_spec.tokenizer_info.mixing.uses_table):
        return None
    config, table_state = table_config(run.model_spec, run.mesh), state.table
    if table_state is not None and state.table_age < mixing.refresh_every:
        return Serving(table_state, refresh.table(table_state, config), state.table_age + 1, {})
    rows_VD = _rows(run, state.train_state.params)
    size = rows_VD.shape[0]
    if table_state is None:
        table_state = refresh.empty_state(size, config)
    table_state, stats = refresh.refresh(table_state, rows_VD, run.model_spec.tokenizer_info.eligible, config)
    figures = {
        "table/cost": config.cost(stats, size),
        "table/rescored": int(stats.rescored) / size,
        "table/searched": int(stats.searched) / size,
    }
    return Serving(table_state, refresh.table(table_state, config), 1, figures)


def before_update(run: Run, served: Serving | None, params: Any) -> jax.Array | None:
    """A copy of the rows that the table is about: the update donates `params`. None without a table."""
    return None if served is None else jnp.array(_rows(run, params), copy=True)


def after_update(
    run: Run, served: Serving | None, before_VD: jax.Array | None, params: Any
) -> refresh.TableState | None:
    """The same table with bounds that take in what the update from `before_VD` to `params` has moved."""
    if served is None or before_VD is None:
        return None
    config = table_config(run.model_spec, run.mesh)
    rows_VD = _rows(run, params)
    return jax.block_until_ready(
        refresh.add_drift(served.state, before_VD, rows_VD, run.model_spec.tokenizer_info.eligible, config)
    )


def _rows(run: Run, params: Any) -> jax.Array:
    return decoder.table_rows(params, run.model_spec.config, run.settings.mixing.table)
