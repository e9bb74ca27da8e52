"""Which rows of a matrix may be neighbours of which.

Owns the two masks, and refuses masks that leave some row too few neighbours. Must not know what makes a row
valid or puts two rows into one group (tokenizers), nor how neighbours are found.

Letter of this file: A anchors, the rows whose neighbours are searched.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Eligible(NamedTuple):
    """Row j may be a neighbour of row i ≠ j if j is valid and not of i's group.

    Attributes:
      valid_V: bool.
      group_V: int32; None where every row is a group of its own.
    """

    valid_V: Any
    group_V: Any = None

    def pairs(self, ids_A: jax.Array) -> jax.Array:
        """bool [A, V]: which rows may be neighbours of the anchors `ids_A`."""
        ids_V = jnp.arange(self.valid_V.shape[0], dtype=jnp.int32)
        allowed_AV = self.valid_V[None, :] & (ids_V[None, :] != ids_A[:, None])
        if self.group_V is None:
            return allowed_AV
        return allowed_AV & (self.group_V[None, :] != self.group_V[ids_A][:, None])


def eligible_rows(size: int, k: int, valid_V: Any = None, group_V: Any = None) -> Eligible:
    """The masks of `size` rows as NumPy arrays, so that they are the same on every host.

    None means that all rows are valid, or that there are no groups. Raises ValueError for a mask that is not
    [size], or leaves some row fewer than k - 1 eligible others.
    """
    for name, mask_V in {"valid_V": valid_V, "group_V": group_V}.items():
        if mask_V is not None and np.shape(mask_V) != (size,):
            raise ValueError(f"{name} must have shape ({size},), one entry a row, not {np.shape(mask_V)}")
    valid_V = np.ones(size, bool) if valid_V is None else np.asarray(valid_V, bool)
    usable = int(valid_V.sum())
    if not 1 <= k <= usable:
        raise ValueError(f"k is {k}, but must be at least 1 and at most the number of valid rows, {usable}")
    if group_V is None:
        return Eligible(valid_V)
    _, number_V = np.unique(np.asarray(group_V), return_inverse=True)
    left = usable - int(np.bincount(number_V, weights=valid_V).max())
    if left < k - 1:
        raise ValueError(
            f"k is {k}, but the largest group of group_V leaves its rows only {left} valid rows of others"
        )
    return Eligible(valid_V, number_V.astype(np.int32))
