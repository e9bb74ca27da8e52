"""How the slots of a rollout are split over a mesh.

Owns the axes that rows and heads are split over. Must not know what slots hold besides a cache.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ngrpo_jax.model.cache import KVCache


@dataclasses.dataclass(frozen=True)
class SlotSharding:
    """Slots split over a mesh: their rows over some axes, key/value heads over at most one."""

    mesh: jax.sharding.Mesh
    rows: tuple[str, ...]
    heads: str | None

    @classmethod
    def of(cls, sharding: NamedSharding, params: Any) -> SlotSharding:
        """Rows as `sharding` splits its leading dimension, heads as the parameters are split."""
        rows = sharding.spec[0]
        of_weights = params["layers"][0]["attention"]["qkv"]["kernel"].sharding
        heads = of_weights.spec[0] if isinstance(of_weights, NamedSharding) and of_weights.spec else None
        assert isinstance(sharding.mesh, jax.sharding.Mesh)
        return cls(sharding.mesh, rows if isinstance(rows, tuple) else (rows,), heads)

    @property
    def shards(self) -> int:
        """Parts that the rows are split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    def over_rows(self) -> NamedSharding:
        """Of an array whose leading dimension is the rows."""
        return NamedSharding(self.mesh, P(self.rows))

    def whole(self) -> NamedSharding:
        """Of an array that every device holds whole."""
        return NamedSharding(self.mesh, P())

    def constrain_cache(self, cache: KVCache, *, split_rows: bool) -> KVCache:
        """The cache with its heads split, and its rows split or whole on every device."""
        rows = self.rows if split_rows else None
        heads = NamedSharding(self.mesh, P(rows, self.heads))
        keys, values = jax.lax.with_sharding_constraint((cache.keys, cache.values), heads)
        lengths_B = jax.lax.with_sharding_constraint(cache.lengths_B, NamedSharding(self.mesh, P(rows)))
        return KVCache(keys, values, lengths_B, cache.cursor)
