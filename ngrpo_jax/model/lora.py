"""Low-rank adapters (LoRA, arXiv 2106.09685): which matrices have them, their parameters, what they add.

A matrix W with an adapter computes x W + s (x A) B. A and B lie beside W in the parameter tree, as `lora_a`
[inputs.., R] and `lora_b` [R, outputs..]. Where a tree has adapters, these alone are trained, and all else is
the base model. Must not know files (peft.py), nor how the products are computed (products.py).

R is the rank. A stacked tree has a leading [L] on each of the shapes above.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.model.config import Lora, ModelConfig

Params = dict[str, Any]
A, B = "lora_a", "lora_b"
# Name of a choice of matrices -> a pattern over their paths.
NAMED = {"all": "layers/", "attention": "layers/attention/", "mlp": "layers/mlp/"}


def matrices(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Path of each matrix of a layer -> the dimensions of its inputs and of its outputs."""
    D, F = (config.hidden_size,), (config.intermediate_size,)
    queries, keys = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    return {
        "layers/attention/q": (D, queries),
        "layers/attention/k": (D, keys),
        "layers/attention/v": (D, keys),
        "layers/attention/o": (queries, D),
        "layers/mlp/gate": (D, F),
        "layers/mlp/up": (D, F),
        "layers/mlp/down": (F, D),
    }


def find_targets(config: ModelConfig, targets: str) -> tuple[str, ...]:
    """The paths of the matrices that `targets` names: a choice of `NAMED`, or a regular expression.

    Raises:
      UserError: nothing has such a path, or the embedding or the head has.
    """
    pattern, known = NAMED.get(targets, targets), list(matrices(config))
    chosen = tuple(path for path in known if re.search(pattern, f"{path}/kernel"))
    frozen = [path for path in ("embed/embedding", "head/rows") if re.search(pattern, path)]
    listed = ", ".join(f"{path}/kernel" for path in known)
    require(
        not frozen,
        f"lora.targets {targets!r} takes in {' and '.join(frozen)}, which has no adapter, so that neighbours "
        f"stay what they are; name matrices of {listed}.",
    )
    require(bool(chosen), f"lora.targets {targets!r} matches no matrix; there are {listed}.")
    return chosen


def check_rank(config: ModelConfig, lora: Lora) -> None:
    """UserError where the rank is above a matrix's smaller side, and names that matrix."""
    for path in lora.targets:
        inputs, outputs = (math.prod(sizes) for sizes in matrices(config)[path])
        require(
            lora.rank <= min(inputs, outputs),
            f"lora.rank is {lora.rank}, but {path}/kernel is {inputs} × {outputs}; it must be at most "
            f"{min(inputs, outputs)}.",
        )


def init(key: jax.Array, config: ModelConfig, lora: Lora) -> Params:
    """Fresh adapters, float32, stacked: A as `lora.init` says, B zero, so that they add nothing yet."""

    def draw(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
        if lora.init == "gaussian":
            return jax.random.normal(key, shape) / lora.rank
        # As PEFT makes it by default.
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / inputs**0.5

    adapters: Params = {}
    for number, path in enumerate(sorted(matrices(config))):
        inputs, outputs = matrices(config)[path]
        if path in lora.targets:
            shape = (config.num_layers, *inputs, lora.rank)
            a = draw(jax.random.fold_in(key, number), shape, math.prod(inputs))
            pair = {A: a, B: jnp.zeros((config.num_layers, lora.rank, *outputs))}
            adapters = joined(adapters, nested(path, pair))
    return adapters


def nested(path: str, leaf: Any) -> Any:
    """{"a": {"b": leaf}} of "a/b"."""
    return functools.reduce(lambda tree, name: {name: tree}, reversed(path.split("/")), leaf)


def split(params: Any) -> tuple[Any, Any]:
    """(what is trained, the rest): the adapters and the base; all and {} where there are no adapters.

    Both have the nesting of `params`, without what is empty. Leaves may be anything: arrays, shardings.
    """
    adapters, base = _part(params, wanted=True), _part(params, wanted=False)
    return (params, {}) if _empty(adapters) else (adapters, base)


def _empty(tree: Any) -> bool:
    """Whether a tree has no leaves; a leaf may be a tuple by descent."""
    if isinstance(tree, dict):
        return all(map(_empty, tree.values()))
    return type(tree) is tuple and all(map(_empty, tree))


def _part(tree: Any, wanted: bool) -> Any:
    """The adapters of a tree, or all else, without what is empty."""
    if type(tree) is tuple:
        return tuple(_part(child, wanted) for child in tree)
    if not isinstance(tree, dict):
        return tree
    parts = {
        name: _part(child, wanted)
        for name, child in tree.items()
        if isinstance(child, dict) or type(child) is tuple or (name in (A, B)) == wanted
    }
    return {name: part for name, part in parts.items() if not _empty(part)}


def joined(one: Any, other: Any) -> Any:
    """The inverse of `split`: a tree with the leaves of both."""
    if type(one) is tuple and type(other) is tuple:
        return tuple(map(joined, one, other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        raise ValueError("the two trees have a leaf in common")
    both = {name: joined(one[name], other[name]) for name in one if name in other}
    return {**one, **other, **both}


def merged(params: Params, config: ModelConfig) -> Params:
    """The base with W + s A B in the place of W, in W's dtype; `params` itself without adapters."""
    if config.lora is None:
        return params
    add = functools.partial(_added, scale=config.lora.scale)

    def merge(tree: Any, stacked: bool) -> Any:
        if type(tree) is tuple:
            return tuple(merge(child, stacked=False) for child in tree)
        if not isinstance(tree, dict):
            return tree
        if A not in tree:
            return {name: merge(child, stacked) for name, child in tree.items()}
        kernel = (jax.vmap(add) if stacked else add)(tree["kernel"], tree[A], tree[B])
        return {name: leaf for name, leaf in tree.items() if name not in (A, B)} | {"kernel": kernel}

    return merge(params, stacked=True)


def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    """W + s A B, the sum in float32."""
    product = jnp.matmul(a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1), precision="highest")
    return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def check_same(one: Lora, other: Lora, where: str) -> None:
    """UserError that names the first property in which the adapter of `where` differs from the settings."""
    for name in ("rank", "scale", "targets"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs and not (name == "scale" and math.isclose(mine, theirs)):
            sentence = f"the adapter in {where} has {name} {theirs}, the settings {mine}"
            raise UserError(f"{sentence}; set lora.rank, lora.alpha and lora.targets to the adapter's.")
