"""The language model as functions of (params, config, inputs), for whole sequences.

Owns the layers' order, the learner's parameter tree and its counts; inference.py decodes single tokens with
the same weights in another layout. Parameters are stacked: every leaf under "layers" has a leading [L], and
layers run under `lax.scan`, so that compile time does not grow with depth. A tuple of L trees in their place
(`unstack_layers`) works as well.

Inputs are token ids or Mixtures (algo/mixture/). Must not know how a mixture was made.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from ngrpo_jax.algo.mixture import Mixture, embed, one_hot
from ngrpo_jax.algo.shards import ALONE, Shards
from ngrpo_jax.model import attention as attentions
from ngrpo_jax.model import lora, products
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.layers import Block, RMSNorm, Rotate, rope_angles, rotate

Params = dict[str, Any]

_ADAPTERS = 1  # folded into a key for fresh adapters, so that the base is that of a model without them
_REMAT_POLICIES = {
    # Saves all but gathered weights: those of every layer would be the whole model.
    "none": lambda primitive, *_, **__: primitive.name not in ("all_gather", "reshape"),
    "full": jax.checkpoint_policies.nothing_saveable,
    # Saves the outputs of weight products and recomputes attention, whose scores grow with T².
    "dots": jax.checkpoint_policies.save_only_these_names(products.NAME),
}


@functools.partial(jax.jit, static_argnums=1)
def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh parameters, stacked: matrices normal, norms 1, biases 0; float32, but for the base of adapters.

    Standard deviations are 1/sqrt(inputs), less where a product is added to the residual stream; 1/sqrt(D) in
    the embedding and the head.
    """
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    V, D = config.vocab_size, config.hidden_size

    def layer(layer_key: jax.Array) -> Params:
        return Block(config).init(layer_key, jnp.zeros((1, 1, D)), lambda q, k, v: q)["params"]

    params: Params = {
        "embed": {"embedding": D**-0.5 * jax.random.normal(embed_key, (V, D))},
        "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": {"scale": jnp.ones((D,))},
    }
    if not config.tie_embeddings:
        params["head"] = {"rows": D**-0.5 * jax.random.normal(head_key, (V, D))}
    if config.lora is None:
        return params
    base = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    return lora.joined(base, fresh_adapters(key, config))


def fresh_adapters(key: jax.Array, config: ModelConfig) -> Params:
    """The adapters of `config.lora` that `init` makes of this key; they add nothing yet."""
    assert config.lora is not None
    return lora.init(jax.random.fold_in(key, _ADAPTERS), config, config.lora)


def unstack_layers(params: Params) -> Params:
    """`params` with "layers" as a tuple of per-layer trees; unchanged if it is one."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    return params | {"layers": _unstacked(layers)}


def hidden_states(
    params: Params,
    config: ModelConfig,
    inputs: jax.Array | Mixture,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    prefix_ids_BT: jax.Array | None = None,
    attend: attentions.Attend = attentions.plain,
    rotate: Rotate = rotate,
    remat: str = "none",
    unroll: bool = False,
    shards: Shards = ALONE,
) -> jax.Array:
    """Outputs of the last layer after the final norm, [B, T, D] in the compute type.

    Args:
      params: in either layout.
      inputs: token ids, int [B, T], or a Mixture [B, T, C].
      positions_BT: position of every token for the rotary angles; 0..T-1 where missing.
      segment_ids_BT: int; tokens attend to earlier tokens (by index in the row) of their own segment alone,
        so that several sequences can share a row. Segment 0 is padding. Missing: each row is one segment.
      prefix_ids_BT: int; a segment that tokens attend to besides their own, 0 for none.
      attend: how attention is computed, one of `attention.make`.
      rotate: how queries and keys are rotated, `rotate` or `rotate_by_product`.
      remat: what the backward pass recomputes, layer by layer: "none", "full" (everything), or "dots" (all
        but the products with weights).
      unroll: write stacked layers out one after the other rather than scan them. A scan copies what the
        backward pass needs into and out of stacked buffers, but its compile time does not grow with L.
      shards: of the mesh on one of whose devices this runs; `params` and the rows are those of that device.

    Raises:
      ValueError: for an unknown `remat`.
    """
    x_BTD = _embed(params, config, inputs, shards)
    B, T, _ = x_BTD.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    chex.assert_shape(positions_BT, (B, T))
    own_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    prefix_BT = jnp.zeros((B, T), jnp.int32) if prefix_ids_BT is None else prefix_ids_BT
    chex.assert_shape([own_BT, prefix_BT], (B, T))
    segments = attentions.Segments(own_BT, prefix_BT)
    rope = rope_angles(config, positions_BT)

    def attend_rotated(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(rotate(q, rope), rotate(k, rope), v, segments)

    layers = params["layers"]
    if unroll and not isinstance(layers, tuple):
        layers = _unstacked(layers)
    stacked = not isinstance(layers, tuple)

    def run_layer(x_BTD: jax.Array, layer: Params) -> jax.Array:
        layer = _gathered(layer, shards, config.dtype)
        own = _own_part(config, shards.tensor.size)
        block = Block(own, shards.tensor)
        return _apply(block, layer, x_BTD, attend_rotated)

    run_layer = _rematerialised(run_layer, remat, in_scan=stacked, gathers=shards.fsdp.size > 1)
    if stacked:
        x_BTD, _ = jax.lax.scan(lambda x, layer: (run_layer(x, layer), None), x_BTD, layers)
    else:
        for layer in layers:
            x_BTD = run_layer(x_BTD, layer)
    return _final_norm(params, config, x_BTD)


def head(params: Params, config: ModelConfig) -> jax.Array:
    """The output rows [V, D] as they are stored: the embedding where the two are tied.

    Rows in both cases, so that the gradients of a tied table's two uses add up without one being transposed.
    """
    return params["embed"]["embedding"] if config.tie_embeddings else params["head"]["rows"]


def table_rows(params: Params, config: ModelConfig, table: str) -> jax.Array:
    """The rows [V, D] that neighbour tables compare: of the input "embedding", or of the "head"."""
    return params["embed"]["embedding"] if table == "embedding" else head(params, config)


def forward(
    params: Params,
    config: ModelConfig,
    inputs: jax.Array | Mixture,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """float32 logits [B, T, V]; arguments as for `hidden_states`."""
    hidden_BTD = hidden_states(
        params, config, inputs, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT
    )
    head_VD = head(params, config).astype(config.dtype)
    return jnp.einsum("btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _unstacked(layers: Params) -> tuple[Params, ...]:
    """Stacked leaves as a tuple of layers. Left to autodiff, each layer's gradient would be a whole stack."""
    depth = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(depth))


_unstacked.defvjp(
    lambda layers: (_unstacked(layers), None),
    lambda _, grads: (jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads),),
)


def _embed(params: Params, config: ModelConfig, inputs: jax.Array | Mixture, shards: Shards) -> jax.Array:
    """[B, T, D] in the compute type, of ids [B, T] or a Mixture [B, T, C]."""
    mixture = inputs if isinstance(inputs, Mixture) else one_hot(inputs, 1)
    chex.assert_rank(mixture.ids, 3)
    embedding_VD = params["embed"]["embedding"]
    return embed(embedding_VD, mixture, size=config.vocab_size, shards=shards).astype(config.dtype)


def _own_part(config: ModelConfig, parts: int) -> ModelConfig:
    """The sizes of a layer on a device, one of so many along the tensor axis."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // parts,
        num_kv_heads=config.num_kv_heads // parts,
        intermediate_size=config.intermediate_size // parts,
    )


def _gathered(layer: Params, shards: Shards, dtype: str) -> Params:
    """A layer whose matrices are whole along fsdp: sent in the compute dtype, once in a pass over the layer.

    Left to XLA, a product with a split matrix may become a loop of partial sums in bfloat16 (on TPUs), or its
    float32 parameters may travel.
    """
    fsdp = shards.fsdp
    if fsdp.size == 1:
        return layer

    def whole(leaf: jax.Array, spec: Any) -> jax.Array:
        dims = tuple(spec)[len(spec) - leaf.ndim :]  # less that of the layers, where they are stacked
        return fsdp.gather(leaf, dims.index(fsdp.name), dtype) if fsdp.name in dims else leaf

    specs = shards.specs["layers"]
    return jax.tree.map(whole, layer, specs[0] if isinstance(specs, tuple) else specs)


def _apply(module: nn.Module, params: Params, *arguments: Any) -> Any:
    """The module with the parameters given; Any, because Linen annotates the result of `apply` too widely."""
    return module.apply({"params": params}, *arguments)


def _final_norm(params: Params, config: ModelConfig, x_BTD: jax.Array) -> Any:
    return _apply(RMSNorm(config.norm_eps, config.dtype), params["final_norm"], x_BTD)


def _rematerialised(run_layer: Callable, remat: str, *, in_scan: bool, gathers: bool) -> Callable:
    """`run_layer` under the named policy. Within a scan, XLA cannot merge the recomputation with the forward
    pass, so that nothing else has to prevent it."""
    if remat == "none" and not gathers:
        return run_layer
    if remat not in _REMAT_POLICIES:
        raise ValueError(f"unknown remat {remat!r}; known: {', '.join(_REMAT_POLICIES)}")
    return jax.checkpoint(run_layer, policy=_REMAT_POLICIES[remat], prevent_cse=not in_scan)


def parameter_shapes(config: ModelConfig) -> Any:
    """The learner's parameter tree as jax.ShapeDtypeStruct."""
    return jax.eval_shape(lambda key: init(key, config), jax.random.key(0))


@functools.cache
def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, without those of adapters."""
    return _count(parameter_shapes(dataclasses.replace(config, lora=None)))


@functools.cache
def trained_count(config: ModelConfig) -> int:
    """Number of parameters that training changes: the adapters' where there are any, else all."""
    return _count(lora.split(parameter_shapes(config))[0])


def _count(shapes: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
