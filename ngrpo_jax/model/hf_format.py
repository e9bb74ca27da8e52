"""The Hugging Face checkpoint format as tables: keys of config.json, names and shapes of tensors.

Pure functions from dictionaries to dictionaries; hf.py reads and writes the files.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.model.config import ModelConfig, RopeScaling

_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
# Values of transformers' configuration classes for keys that config.json leaves out.
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_QWEN3_HEAD_DIM = 128


class Tensor(NamedTuple):
    """One leaf of the parameter tree and the tensors of the checkpoint that make it."""

    path: tuple[str, ...]
    name: str  # with "{layer}" where every layer has one
    shape: tuple[int, ...]  # of one layer, in the parameter tree
    hf_shape: tuple[int, ...]

    @property
    def per_layer(self) -> bool:
        return self.path[0] == "layers"

    @property
    def transposed(self) -> bool:
        """Kernels are [in, out] in the parameter tree and [out, in] in the checkpoint."""
        return self.path[-1] == "kernel"

    def names(self, config: ModelConfig) -> list[str]:
        """Names of this leaf's tensors, in the order of the leading [L]."""
        return [self.name.format(layer=i) for i in range(config.num_layers if self.per_layer else 1)]


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every leaf of `config`'s parameters; a tied head is not one."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    layer = "model.layers.{layer}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    table: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = [
        ("embed/embedding", "model.embed_tokens.weight", (V, D), (V, D)),
        ("layers/input_norm/scale", layer + "input_layernorm.weight", (D,), (D,)),
        ("layers/attention/q/kernel", attention + "q_proj.weight", (D, N, H), (N * H, D)),
        ("layers/attention/k/kernel", attention + "k_proj.weight", (D, K, H), (K * H, D)),
        ("layers/attention/v/kernel", attention + "v_proj.weight", (D, K, H), (K * H, D)),
        ("layers/attention/o/kernel", attention + "o_proj.weight", (N, H, D), (D, N * H)),
        ("layers/post_attention_norm/scale", layer + "post_attention_layernorm.weight", (D,), (D,)),
        ("layers/mlp/gate/kernel", mlp + "gate_proj.weight", (D, F), (F, D)),
        ("layers/mlp/up/kernel", mlp + "up_proj.weight", (D, F), (F, D)),
        ("layers/mlp/down/kernel", mlp + "down_proj.weight", (F, D), (D, F)),
        ("final_norm/scale", "model.norm.weight", (D,), (D,)),
    ]
    if config.qkv_bias:
        for part, heads in (("q", N), ("k", K), ("v", K)):
            name = f"{attention}{part}_proj.bias"
            table.append((f"layers/attention/{part}/bias", name, (heads, H), (heads * H,)))
    if config.qk_norm:
        for part in ("q", "k"):
            name = f"{attention}{part}_norm.weight"
            table.append((f"layers/attention/{part}_norm/scale", name, (H,), (H,)))
    if not config.tie_embeddings:
        table.append(("head/rows", "lm_head.weight", (V, D), (V, D)))
    return [Tensor(tuple(path.split("/")), name, shape, hf_shape) for path, name, shape, hf_shape in table]


def config_from_json(raw: Mapping[str, Any], generation: Mapping[str, Any], dtype: str) -> ModelConfig:
    """ModelConfig of a parsed config.json and (possibly empty) generation_config.json.

    Raises:
      UserError: for an unknown architecture, a missing or ill-typed key, or a feature that is not built.
    """
    architecture = _architecture(raw)
    refusals = _refusals(raw, architecture)
    require(not refusals, "; ".join(refusals))
    missing = [key for key in _SIZES.values() if raw.get(key) is None]
    require(not missing, f"missing {', '.join(missing)}")
    sizes: dict[str, Any] = {ours: _integer(raw, theirs) for ours, theirs in _SIZES.items()}
    divided = sizes["hidden_size"] // max(sizes["num_heads"], 1)
    theta, scaling = _rope(raw)
    return ModelConfig(
        architecture=architecture,
        **sizes,
        num_kv_heads=_integer(raw, "num_key_value_heads", sizes["num_heads"]),
        head_dim=_integer(raw, "head_dim", _DEFAULT_QWEN3_HEAD_DIM if architecture == "qwen3" else divided),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(raw, "rms_norm_eps", _DEFAULT_NORM_EPS),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_eos_token_ids(raw, generation),
        dtype=dtype,
    )


def config_to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a checkpoint whose weights are `dtype`, with the keys of transformers 4 and of 5.

    Version 4 reads `torch_dtype`, `rope_theta` and `rope_scaling`, version 5 `dtype` and `rope_parameters`;
    neither is disturbed by the other's keys.
    """
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    eos = config.eos_token_ids
    raw = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()} | {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    switches = {"qwen2": ("use_sliding_window",), "qwen3": ("use_sliding_window", "attention_bias")}
    return raw | dict.fromkeys(switches.get(config.architecture, ("attention_bias", "mlp_bias")), False)


def _architecture(raw: Mapping[str, Any]) -> str:
    known = ", ".join(_CLASSES.values())
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    if kind not in _CLASSES:
        raise UserError(f"unknown architecture: model_type {kind!r}, architectures {classes}; known: {known}")
    fits = not classes or _CLASSES[kind] in classes
    require(fits, f"unknown architecture: {', '.join(map(str, classes))}; known: {known}")
    return kind


def _refusals(raw: Mapping[str, Any], architecture: str) -> list[str]:
    """Features of this checkpoint that the decoder does not have, one clause each."""
    act, biased = raw.get("hidden_act", "silu"), raw.get("attention_bias") and architecture != "qwen2"
    other = sorted(set(map(str, raw.get("layer_types") or [])) - {"full_attention"})
    sliding = ", ".join(other) or "use_sliding_window"
    clauses = {
        f"hidden_act {act!r} is not supported, only 'silu'": act != "silu",
        f"attention_bias is not supported for {architecture}": biased,
        "mlp_bias is not supported": raw.get("mlp_bias"),
        f"sliding-window attention is not supported ({sliding})": raw.get("use_sliding_window") or other,
        "quantized weights (quantization_config) are not supported": raw.get("quantization_config"),
    }
    return [clause for clause, holds in clauses.items() if holds]


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    given: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        section = raw.get(key) or {}
        flat = isinstance(section, Mapping) and not any(isinstance(x, Mapping) for x in section.values())
        require(flat, f"{key} must be one flat table for all layers")
        # The oldest name of the kind is "type". Of two sections rope_scaling decides, as in transformers.
        kind = section.get("rope_type") or section.get("type")
        given |= section if kind is None else {**section, "rope_type": kind}
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    require(partial in (None, 1), f"partial_rotary_factor {partial} is not supported, only 1")
    theta = _number(given, "rope_theta", _number(raw, "rope_theta", _DEFAULT_ROPE_THETA))
    kind = given.get("rope_type") or "default"
    if kind == "default":
        return theta, None
    require(kind == "llama3", f"rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    kinds = {field.name: field.type for field in dataclasses.fields(RopeScaling)}
    missing = [name for name in kinds if given.get(name) is None]
    require(not missing, f"rope_type 'llama3' is missing {', '.join(missing)}")
    read: dict[Any, Callable[..., Any]] = {int: _integer, float: _number}
    return theta, RopeScaling(**{name: read[kind](given, name) for name, kind in kinds.items()})


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    """The union of `eos_token_id` over the files, in order of appearance: no file alone is complete."""
    key = "eos_token_id"
    given = [source.get(key) for source in sources]
    tokens = [token for ids in given for token in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(_integer({key: token}, key) for token in tokens if token is not None))


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value: Any = default if raw.get(key) is None else raw[key]
    require(type(value) is int, f"{key} must be a whole number, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value: Any = default if raw.get(key) is None else raw[key]
    require(type(value) in (int, float), f"{key} must be a number, not {value!r}")
    return float(value)
