"""The neighbour table of a training run: refreshed before a rollout, its bounds widened by each update.

Owns which matrix the table is of, when it is refreshed, and the metrics of a refresh. Must not know how a
table is computed or why it is exact (algo/neighbors/refresh.py).
"""

from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.algo.neighbors import refresh
from ngrpo_jax.model import decoder
from ngrpo_jax.run.state import Run, RunState, Table
from ngrpo_jax.setup.neighbor_table import table_config


def refresh_table(run: Run, state: RunState) -> tuple[Table | None, dict[str, float]]:
    """The table of the next rollout and, where it was refreshed, the metrics of that.

    A table is refreshed after `mixing.refresh_every` rollouts, and never under adapters, whose base stays as
    it is. None where the rollout mixes without a table.
    """
    tokenizer_info, table = run.model_spec.tokenizer_info, state.table
    if not (run.settings.mixing.active and tokenizer_info.mixing.uses_table):
        return None, {}
    if table is not None and (_constant(run) or table.age < run.settings.mixing.refresh_every):
        return table._replace(age=table.age + 1), {}
    config = table_config(run.model_spec, run.mesh)
    rows_VD = _rows(run, run.on_devices(state.train_state.params))
    size = rows_VD.shape[0]
    before = refresh.empty_state(size, config) if table is None else table.state
    refreshed, stats = refresh.refresh(before, rows_VD, tokenizer_info.eligible, config)
    metrics = {
        "table/cost": refresh.cost(stats, size, config),
        "table/rescored": int(stats.rescored) / size,
        "table/searched": int(stats.searched) / size,
    }
    return Table(refreshed, 1), metrics


def neighbors(run: Run, table: Table | None) -> jax.Array | None:
    """The rows of each token's neighbours as the rollout reads them, int32 [V, k]; None without a table."""
    return None if table is None else refresh.table(table.state, table_config(run.model_spec, run.mesh))


def copy_rows(run: Run, table: Table | None, params: Any) -> jax.Array | None:
    """A copy of the matrix that the table is of, [V, D], for `add_drift`; None where no table drifts.

    An update donates its parameters, so the copy is made before.
    """
    return None if table is None or _constant(run) else jnp.array(_rows(run, params), copy=True)


def add_drift(run: Run, table: Table | None, before_VD: jax.Array | None, params: Any) -> Table | None:
    """The table with bounds that allow for the update from `before_VD` to `params`."""
    if table is None or before_VD is None:
        return table
    config, eligible = table_config(run.model_spec, run.mesh), run.model_spec.tokenizer_info.eligible
    drifted = refresh.add_drift(table.state, before_VD, _rows(run, params), eligible, config)
    return table._replace(state=jax.block_until_ready(drifted))


def _constant(run: Run) -> bool:
    return run.model_spec.config.lora is not None


def _rows(run: Run, params: Any) -> jax.Array:
    return decoder.table_rows(params, run.model_spec.config, run.settings.mixing.table)
