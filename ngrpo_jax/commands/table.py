"""The neighbour table of a training run: refreshed before a rollout, told of every update after it.

Owns whose rows it is about, when it is refreshed, and what that has cost. Must not know how a table is made
or why it may be trusted (algo/refresh.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngrpo_jax.algo import refresh
from ngrpo_jax.commands import composition
from ngrpo_jax.commands.run import Position, Run
from ngrpo_jax.model import decoder


class Serving(NamedTuple):
    """The table of one rollout."""

    state: refresh.Maintained
    table_VC: jax.Array
    age: int  # rollouts that it has served, this one included
    figures: dict[str, float]  # what a refresh has cost; empty where there was none


def serve(run: Run, position: Position) -> Serving | None:
    """The table to mix by, refreshed every `mixing.refresh_every` rollouts; None where none is needed."""
    mixing = run.settings.mixing
    if not (mixing.active and run.source.language.mixing.uses_table):
        return None
    upkeep, state = composition.table_upkeep(run.source, run.mesh), position.table
    if state is not None and position.table_age < mixing.refresh_every:
        return Serving(state, refresh.table(state, upkeep), position.table_age + 1, {})
    rows_VD = _rows(run, position.state.params)
    size = rows_VD.shape[0]
    if state is None:
        state = refresh.nothing(size, upkeep)
    state, effort = refresh.refresh(state, rows_VD, run.source.language.eligible, upkeep)
    figures = {
        "table/cost": upkeep.cost(effort, size),
        "table/rescored": int(effort.rescored) / size,
        "table/searched": int(effort.searched) / size,
    }
    return Serving(state, refresh.table(state, upkeep), 1, figures)


def before_update(run: Run, served: Serving | None, params: Any) -> jax.Array | None:
    """A copy of the rows that the table is about: the update donates `params`. None without a table."""
    return None if served is None else jnp.array(_rows(run, params), copy=True)


def after_update(
    run: Run, served: Serving | None, before_VD: jax.Array | None, params: Any
) -> refresh.Maintained | None:
    """The same table with bounds that take in what the update from `before_VD` to `params` has moved."""
    if served is None or before_VD is None:
        return None
    upkeep = composition.table_upkeep(run.source, run.mesh)
    rows_VD = _rows(run, params)
    return jax.block_until_ready(
        refresh.follow(served.state, before_VD, rows_VD, run.source.language.eligible, upkeep)
    )


def _rows(run: Run, params: Any) -> jax.Array:
    return decoder.table_rows(params, run.source.config, run.settings.mixing.table)
