"""Adapter directories of Hugging Face's PEFT: reads one as adapters of a model, writes adapters as one.

Owns adapter_config.json and the names of the tensors. Must not need torch, nor the peft package. What PEFT
has beyond plain LoRA on a layer's matrices is refused by name.
"""

import math
import os
import pathlib
from typing import Any

import numpy as np
import safetensors

from ngrpo_jax import files
from ngrpo_jax.errors import UserError, explained, require, storage
from ngrpo_jax.model import hf_directory, hf_weights, lora
from ngrpo_jax.model.config import Lora, ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "ngrpo_base"  # in the metadata of the weights: the base that the adapter was trained on
_REMEDY = "fetch it again"
# The end of a matrix's path -> its module within a layer.
_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# Keys of adapter_config.json -> the values with which an adapter is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    # The others change the base model, so that the adapter is not one of the weights as they are in files.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


def check(path: str | os.PathLike[str], config: ModelConfig) -> Lora:
    """The adapters that a directory holds, after every check of `read`; reads only headers."""
    return _opened(pathlib.Path(path), config)[0]


def read(path: str | os.PathLike[str], config: ModelConfig, fingerprint: str) -> tuple[Lora, lora.Params]:
    """Adapters of a PEFT directory: what they are, and float32 host arrays in the nesting of `lora.init`.

    Args:
      fingerprint: of the base, "DTYPE:DIGEST"; an adapter that was trained on another one is refused, where
        its own is known and of the same dtype.

    Raises:
      UserError: no adapter in the directory, a broken file, an adapter that is not plain LoRA, or one of
        another base: other tensors, other shapes, another fingerprint.
    """
    directory = pathlib.Path(path)
    found, file = _opened(directory, config)
    trained_on = (file.metadata() or {}).get(FINGERPRINT, fingerprint)
    require(
        trained_on == fingerprint or trained_on.partition(":")[0] != fingerprint.partition(":")[0],
        f"the adapter in {directory} was trained on another base model; name that one by model.path.",
    )
    adapters: lora.Params = {}
    for target in found.targets:
        inputs, outputs = lora.matrices(config)[target]
        a = np.stack([file.get_tensor(name).astype(np.float32).T for name in _names(config, target, "A")])
        b = np.stack([file.get_tensor(name).astype(np.float32).T for name in _names(config, target, "B")])
        for name, part in (("A", a), ("B", b)):
            require(
                bool(np.isfinite(part).all()),
                f"lora_{name} of {_module(target)} in {directory} holds values that are "
                f"not finite: {_REMEDY}",
            )
        pair = {
            lora.A: a.reshape(config.num_layers, *inputs, found.rank),
            lora.B: b.reshape(config.num_layers, found.rank, *outputs),
        }
        adapters = lora.joined(adapters, lora.nested(target, pair))
    return found, adapters


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    adapters: lora.Params,
    *,
    base: str | os.PathLike[str],
    fingerprint: str,
) -> None:
    """Writes a directory that `read` and PEFT read, whole or not at all, with the tokenizer's files.

    Args:
      adapters: host arrays, stacked.
      base: directory of the base model, which adapter_config.json names, with the tokenizer.
      fingerprint: of the base, "DTYPE:DIGEST".

    Raises:
      UserError: a directory that may not be replaced, or no tokenizer in `base`.
    """
    own = config.lora
    assert own is not None
    tensors: dict[str, np.ndarray] = {}
    for target in own.targets:
        leaf: Any = adapters
        for part in target.split("/"):
            leaf = leaf[part]
        for which, name in (("A", lora.A), ("B", lora.B)):
            shape = config.num_layers, *_shape(config, target, which, own.rank)
            matrices = np.asarray(leaf[name], np.float32).reshape(shape)
            for tensor, matrix in zip(_names(config, target, which), matrices, strict=True):
                tensors[tensor] = np.ascontiguousarray(matrix.T)
    copied = hf_directory.tokenizer_files(pathlib.Path(base))
    with hf_directory.replaced(path) as partial:
        files.write_json(partial / CONFIG, _to_json(own, os.path.abspath(base)))
        hf_weights.write_file(partial / WEIGHTS, tensors, **{FINGERPRINT: fingerprint})
        hf_directory.copy(copied, partial)


def _to_json(own: Lora, base: str) -> dict[str, Any]:
    """adapter_config.json; alpha is the one that gives `own.scale` by PEFT's default scaling, alpha / r."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": own.rank,
        "lora_alpha": own.scale * own.rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(_module(target).rpartition(".")[2] for target in own.targets),
    }


def _opened(directory: pathlib.Path, config: ModelConfig) -> tuple[Lora, Any]:
    """What a directory's adapters are, and its open file of weights, all checked."""
    require(directory.is_dir(), f"{directory} is no directory; model.adapter names that of a PEFT adapter")
    for name in (CONFIG, WEIGHTS):
        require((directory / name).is_file(), f"{directory} has no {name}: it is no adapter of PEFT")
    raw = files.read_json(directory / CONFIG, _REMEDY)
    odd = [f"{key} {raw[key]!r}" for key, plain in _PLAIN.items() if key in raw and raw[key] not in plain]
    require(
        not odd,
        f"the adapter in {directory} has {', '.join(odd)}, which is not built; merge it into its base model "
        "and give that as model.path.",
    )
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{directory / CONFIG} has r {rank!r} and lora_alpha {alpha!r}: {_REMEDY}")
    weights = directory / WEIGHTS
    broken = f"{weights} is broken or half-downloaded"
    with explained(safetensors.SafetensorError, broken, _REMEDY), storage(weights):
        file = safetensors.safe_open(weights, framework="np")
    given = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    targets = tuple(t for t in lora.matrices(config) if any(name in given for name in _names(config, t, "A")))
    scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    own = Lora(rank, float(scale), targets)
    wanted = {
        name: _shape(config, target, which, rank)[::-1]
        for target in targets
        for which in ("A", "B")
        for name in _names(config, target, which)
    }
    unknown, missing = sorted(given.keys() - wanted.keys()), sorted(wanted.keys() - given.keys())
    misfits = [
        *(f"{name} is no factor of a layer's matrix" for name in unknown),
        *(f"{name} is missing" for name in missing),
        *(
            f"{name} has shape {list(given[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if given.get(name, shape) != shape
        ),
    ]
    shown = "; ".join(misfits[:3]) or "it is empty"
    shown += f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    require(
        bool(targets) and not misfits,
        f"the adapter in {directory} does not fit this model ({shown});"
        " give the base model that it was trained on.",
    )
    return own, file


def _shape(config: ModelConfig, target: str, which: str, rank: int) -> tuple[int, int]:
    """Rows and columns of a factor as it lies in the parameter tree; files hold the transpose."""
    inputs, outputs = (math.prod(sizes) for sizes in lora.matrices(config)[target])
    return (inputs, rank) if which == "A" else (rank, outputs)


def _names(config: ModelConfig, target: str, which: str) -> list[str]:
    """Names of a factor's tensors, layer by layer."""
    layer = "base_model.model.model.layers.{layer}." + f"{_module(target)}.lora_{which}.weight"
    return [layer.format(layer=number) for number in range(config.num_layers)]


def _module(target: str) -> str:
    return _MODULES[target.rpartition("/")[2]]
