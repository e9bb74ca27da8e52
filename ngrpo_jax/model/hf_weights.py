"""Weights of Hugging Face directories: reads and writes safetensors files, one or several with an index.

Works through the table of tensors in hf_format.py and must not know architectures. Arrays are NumPy's.
"""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ngrpo_jax import files
from ngrpo_jax.errors import UserError, explained, require, storage
from ngrpo_jax.model import hf_format
from ngrpo_jax.model.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMEDY = "fetch it again"  # for a broken file of a checkpoint
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 8192

Files = dict[str, Any]  # tensor name -> the open safetensors file that holds it
Shapes = Mapping[str, tuple[int, ...]]


def open_files(directory: pathlib.Path, stack: contextlib.ExitStack) -> Files:
    """Every tensor of a directory by name, with the open file that holds it; `stack` closes the files."""
    files: Files = {}
    for path in _weight_paths(directory):
        with (
            explained(safetensors.SafetensorError, f"{path} is broken or half-downloaded", REMEDY),
            storage(path),
        ):
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        for name in file.keys():  # noqa: SIM118 (the file object is no mapping)
            require(name not in files, f"{path} holds {name}, which another file of {directory} holds too")
            files[name] = file
    return files


def check(config: ModelConfig, files: Files, directory: pathlib.Path) -> None:
    """UserError that names every tensor that is missing, unknown, misshapen or of an unknown type."""
    wanted = {name: t.hf_shape for t in hf_format.tensors(config) for name in t.names(config)}
    tied = config.tie_embeddings and _HEAD in files
    if tied:
        wanted[_HEAD] = wanted[_EMBEDDING]
    # Older checkpoints store rotary_emb.inv_freq, which is computed from config.json.
    views = {n: f.get_slice(n) for n, f in files.items() if not n.endswith("rotary_emb.inv_freq")}
    problems = _misfits(wanted, {name: tuple(view.get_shape()) for name, view in views.items()})
    problems += [
        f"{name} has type {view.get_dtype()}, which is none of {', '.join(DTYPES)}"
        for name, view in views.items()
        if name in wanted and view.get_dtype() not in DTYPES
    ]
    require(not problems, f"tensors in {directory} do not fit its config.json: {'; '.join(problems)}")
    if tied:
        _check_tied(files, directory)


def _misfits(wanted: Shapes, given: Shapes) -> list[str]:
    """What is wrong with the given shapes, one clause for each name at fault."""
    return [
        *(f"missing {name}" for name in wanted if name not in given),
        *(f"unknown {name}" for name in given if name not in wanted),
        *(
            f"{name} has shape {list(given[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if given.get(name, shape) != shape
        ),
    ]


def read_leaf(tensor: hf_format.Tensor, config: ModelConfig, files: Files, dtype: str) -> np.ndarray:
    """One leaf of the stacked parameter tree: [L, ...] within the layers, [...] outside of them.

    UserError, naming the tensor, where a value is not finite.
    """
    names = tensor.names(config)
    out = np.empty((len(names), *tensor.shape), jnp.dtype(dtype))
    for part, name in zip(out, names, strict=True):
        stored = files[name].get_tensor(name)
        stored = stored.T if tensor.transposed else stored
        part.reshape(stored.shape)[...] = stored  # a view: `part` is contiguous
        if not np.isfinite(part).all():
            bad = int(np.size(part) - np.isfinite(part).sum())
            raise UserError(f"{name} holds {bad} values that are not finite in {dtype}: {REMEDY}")
    return out if tensor.per_layer else out[0]


def check_params(config: ModelConfig, params: dict[str, Any]) -> None:
    """ValueError that names every leaf of `params`, in either layout, that does not fit `config`."""
    L, unstacked = config.num_layers, isinstance(params.get("layers"), tuple)
    wanted: dict[str, tuple[int, ...]] = {}
    for tensor in hf_format.tensors(config):
        first, *rest = tensor.path
        if tensor.per_layer and unstacked:
            wanted |= {"/".join([first, str(i), *rest]): tensor.shape for i in range(L)}
        else:
            wanted["/".join(tensor.path)] = (L, *tensor.shape) if tensor.per_layer else tensor.shape
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    given = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    problems = _misfits(wanted, given)
    if problems:
        raise ValueError(f"parameters do not fit the model's configuration: {'; '.join(problems)}")


def sizes(config: ModelConfig, params: dict[str, Any], dtype: str | None) -> dict[str, int]:
    """Bytes of every tensor by its Hugging Face name, in the order of `stored`."""
    found: dict[str, int] = {}
    for tensor in hf_format.tensors(config):
        itemsize = jnp.dtype(dtype or leaves(tensor, params)[0].dtype).itemsize
        found |= dict.fromkeys(tensor.names(config), math.prod(tensor.hf_shape) * itemsize)
    return found


def write_files(
    directory: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], sizes: dict[str, int], limit: int
) -> None:
    """Writes every tensor, in one file where they fit into `limit` bytes, else in several with an index.

    Host memory holds one file's tensors at a time, and what `tensors` keeps.
    """
    shards = _cut(sizes, limit)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        held = dict(itertools.islice(tensors, len(names)))
        write_file(directory / file, held)
        weight_map |= dict.fromkeys(names, file)
        del held  # before the next leaf is made
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        files.write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Writes one safetensors file, readable as its directory is."""
    # transformers 4 refuses files without the name of a framework.
    with _system_errors():
        safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    # safetensors makes files that only their owner can read.
    path.chmod(path.parent.stat().st_mode & 0o666)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """The OSError that safetensors has put into the text of an error of its own."""
    try:
        yield
    except safetensors.SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _weight_paths(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights: the single one, or all that the index lists."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    require(index.is_file(), f"{directory} has neither {SINGLE} nor {INDEX}: fetch its safetensors files")
    weight_map = files.read_json(index, REMEDY).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: {REMEDY}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    require(not missing, f"{directory} is half-downloaded: {INDEX} lists {', '.join(missing)}; fetch them")
    return [directory / name for name in names]


def _check_tied(files: Files, directory: pathlib.Path) -> None:
    """UserError where a tied model has an output matrix other than its embedding; compares block by block."""
    first, second = files[_EMBEDDING].get_slice(_EMBEDDING), files[_HEAD].get_slice(_HEAD)
    rows = first.get_shape()[0]
    for start in range(0, rows, _COMPARED_ROWS):
        block = slice(start, min(start + _COMPARED_ROWS, rows))
        if not np.array_equal(first[block], second[block]):
            raise UserError(
                f"{_HEAD} in {directory} differs from {_EMBEDDING} although config.json ties them: "
                "set tie_word_embeddings to false there, or remove the tensor"
            )


def _cut(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a tensor larger than that is a group of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def stored(
    config: ModelConfig, params: dict[str, Any], dtype: str | None, to_host: Callable[[Any], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, in the order of the table, one leaf at a time on the host.

    `dtype` None keeps each leaf's own.
    """
    for tensor in hf_format.tensors(config):
        names = iter(tensor.names(config))
        for array in leaves(tensor, params):
            # A generator's variables end with it: no part of this leaf is held while the next one is made.
            yield from ((next(names), part) for part in _parts(tensor, to_host(array), dtype))


def _parts(tensor: hf_format.Tensor, leaf: np.ndarray, dtype: str | None) -> Iterator[np.ndarray]:
    """The checkpoint's arrays of one leaf: one a layer where it is stacked, else one."""
    for part in leaf.reshape(-1, *tensor.shape):
        part = part.astype(jnp.dtype(dtype or part.dtype), copy=False)
        if tensor.transposed:
            part = part.reshape(tensor.hf_shape[::-1]).T
        # safetensors writes the buffer without regard to strides.
        yield np.ascontiguousarray(part.reshape(tensor.hf_shape))


def leaves(tensor: hf_format.Tensor, params: dict[str, Any]) -> list[Any]:
    """The arrays that hold `tensor`: one a layer in the unstacked layout, else one."""
    trees, path = [params], tensor.path
    if tensor.per_layer and isinstance(params["layers"], tuple):
        trees, path = list(params["layers"]), path[1:]
    return [functools.reduce(lambda branch, part: branch[part], path, tree) for tree in trees]
