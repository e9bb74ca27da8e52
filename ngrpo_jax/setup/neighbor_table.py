"""The neighbour table of a model as its settings and tokenizer want it: built whole, or kept up to date."""

from typing import Any

import jax

from ngrpo_jax.algo.neighbors import neighbor_table, refresh
from ngrpo_jax.model import decoder
from ngrpo_jax.setup.model_spec import ModelSpec


def build_table(params: Any, model_spec: ModelSpec, devices: jax.sharding.Mesh) -> jax.Array | None:
    """The neighbour table of these parameters, or None where the strategy mixes without one."""
    mixing, eligible = model_spec.tokenizer_info.mixing, model_spec.tokenizer_info.eligible
    if not mixing.uses_table:
        return None
    return neighbor_table(
        decoder.table_rows(params, model_spec.config, mixing.table),
        mixing.k,
        metric=mixing.metric,
        valid_V=eligible.valid_V,
        group_V=eligible.group_V,
        mesh=devices,
    )


def table_config(model_spec: ModelSpec, devices: jax.sharding.Mesh) -> refresh.TableConfig:
    """How the neighbour table of these settings is made and kept: on all devices."""
    mixing = model_spec.tokenizer_info.mixing
    return refresh.TableConfig(mixing.k, mixing.metric, devices)
