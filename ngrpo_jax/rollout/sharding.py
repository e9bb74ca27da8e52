"""How the slots of a rollout are split over a mesh.

Owns the axes that rows and heads are split over. Must not know what slots hold besides a cache.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ngrpo_jax.model.cache import KVCache

Axes = tuple[str, ...] | str | None  # mesh axes that a dimension is split over; None: it is whole


@dataclasses.dataclass(frozen=True)
class SlotSharding:
    """Rows split over some axes of a mesh, key/value heads over at most one; without a mesh, one device."""

    mesh: jax.sharding.Mesh | None = None
    rows: tuple[str, ...] = ()
    heads: str | None = None

    @classmethod
    def of(cls, sharding: NamedSharding | None, params: Any) -> Self:
        """Rows as `sharding` splits its leading dimension, heads as the parameters are split."""
        if sharding is None:
            return cls()
        rows = sharding.spec[0]
        of_weights = params["layers"][0]["attention"]["qkv"]["kernel"].sharding
        heads = of_weights.spec[0] if isinstance(of_weights, NamedSharding) and of_weights.spec else None
        assert isinstance(sharding.mesh, jax.sharding.Mesh)
        return cls(sharding.mesh, rows if isinstance(rows, tuple) else (rows,), heads)

    @property
    def shards(self) -> int:
        """Parts of equal size that the rows are split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rows) if self.mesh else 1

    def whole(self, array: Any) -> jax.Array:
        """An array of the host, whole on every device."""
        return jax.device_put(array, None if self.mesh is None else NamedSharding(self.mesh, P()))

    def constrain(self, arrays: Any, *axes: Axes) -> Any:
        """Arrays whose leading dimensions are split over these axes, inside of a compiled program."""
        if self.mesh is None:
            return arrays
        return jax.lax.with_sharding_constraint(arrays, NamedSharding(self.mesh, P(*axes)))

    def constrain_cache(self, cache: KVCache, rows: Axes) -> KVCache:
        """The same of a cache: its rows over these axes, its heads over those of the parameters."""
        keys, values = self.constrain((cache.keys, cache.values), rows, self.heads)
        return KVCache(keys, values, self.constrain(cache.lengths_B, rows), cache.cursor)

    def by_device(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """A function of arrays, run on each device over its own part of them, as jax.shard_map splits."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


ONE_DEVICE = SlotSharding()
