"""float32 <-> int32 in the same order: integer maxima, bisection and packing then need no care for signs."""

import jax
import jax.numpy as jnp


def ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order, from -inf to inf; -0 comes just before 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def unordered(keys: jax.Array) -> jax.Array:
    """The inverse of `ordered`."""
    bits = keys ^ ((keys >> 31) & jnp.int32(0x7FFFFFFF))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


NEGATIVE_INFINITY = jnp.iinfo(jnp.int32).min + 0x007FFFFF  # `ordered` of it
