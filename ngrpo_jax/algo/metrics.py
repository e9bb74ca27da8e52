"""Metrics that know how they join: sums with their denominator, and extremes.

A metric is a small pytree of scalars that a compiled program may carry. Metrics of parts (chunks of tokens,
microbatches) join by `reduce` and `combine`; `value` makes one number of those of a batch's optimiser steps.
Must not know what any metric measures.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Scalar = Any  # jax.Array in a program, a NumPy scalar or float on the host
Metrics = dict[str, Any]  # name -> metric, or a group of metrics as another dict


class Mean(NamedTuple):
    """Σ weight · x, reported as Σ weight · x / Σ weight."""

    total: Scalar
    weight: Scalar


class Sum(NamedTuple):
    """Σ x over tokens, reported as it is; `weight` says whether any token had a part in it."""

    total: Scalar
    weight: Scalar


class Min(NamedTuple):
    """The least x; inf where there was none."""

    extreme: Scalar


class Max(NamedTuple):
    """The largest x; -inf where there was none."""

    extreme: Scalar


Metric = Mean | Sum | Min | Max

# How stacked parts join, how those of several devices do, and the value that joins with any other without
# changing it.
_JOIN: dict[Any, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    Mean: (jnp.sum, jax.lax.psum, 0.0),
    Sum: (jnp.sum, jax.lax.psum, 0.0),
    Min: (jnp.min, jax.lax.pmin, math.inf),
    Max: (jnp.max, jax.lax.pmax, -math.inf),
}


def is_metric(x: Any) -> bool:
    """Whether x is one metric rather than a group of them."""
    return type(x) in _JOIN


def reduce(stacked: Metrics) -> Metrics:
    """Metrics of parts, stacked along a leading axis -> of the whole."""
    return jax.tree.map(
        lambda metric: type(metric)(*(_JOIN[type(metric)][0](part, axis=0) for part in metric)),
        stacked,
        is_leaf=is_metric,
    )


def combine(some: Metrics, more: Metrics) -> Metrics:
    """Metrics of two parts -> of both."""
    return reduce(jax.tree.map(lambda *parts: jnp.stack(parts), some, more))


def over_devices(own: Metrics, axes: tuple[str, ...]) -> Metrics:
    """Metrics of each device along these axes of a mesh -> of all; inside of `jax.shard_map`."""
    return jax.tree.map(
        lambda metric: type(metric)(*(_JOIN[type(metric)][1](part, axes) for part in metric)),
        own,
        is_leaf=is_metric,
    )


def empty(like: Metrics) -> Metrics:
    """Metrics of no part at all, of the types of `like` (arrays or their shapes)."""
    return jax.tree.map(
        lambda metric: type(metric)(*(jnp.full((), _JOIN[type(metric)][2], part.dtype) for part in metric)),
        like,
        is_leaf=is_metric,
    )


def value(steps: Sequence[Metric]) -> float:
    """One number from a metric of each optimiser step of a batch: the extreme, or the mean over the steps.

    A step in which no token has any weight is left out of the mean; NaN where that leaves none.
    """
    if isinstance(steps[0], Min | Max):
        join = min if isinstance(steps[0], Min) else max
        return float(join(step[0] for step in steps))
    values = [
        float(step.total) / (float(step.weight) if isinstance(step, Mean) else 1.0)
        for step in steps
        if isinstance(step, Mean | Sum) and step.weight > 0
    ]
    return float(np.mean(values)) if values else math.nan
