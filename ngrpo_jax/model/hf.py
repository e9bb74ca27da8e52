"""Hugging Face directories: loads a model from one, saves a model as one, finds one by its hub name.

Owns the directory as a whole. The tables of hf_format.py describe config.json and the tensors; hf_weights.py
reads and writes the weights. Supports safetensors alone, and must not need torch.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ngrpo_jax import files
from ngrpo_jax.errors import UserError, explained, require
from ngrpo_jax.model import hf_directory, hf_format, hf_weights, peft
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import Params

_CONFIG = "config.json"


def load(path: str | os.PathLike, *, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """Model of a Hugging Face directory: safetensors, one file or sharded, of float32, bfloat16 or float16.

    Args:
      path: directory with config.json and the weights (`locate` gives one for a hub name).
      dtype: type of the parameters, whatever the file's type, and `ModelConfig.dtype`.

    Returns:
      (config, parameters in the stacked layout, on the default device).

    Raises:
      UserError: no directory, no config.json, no weights, or a shard that the index names is missing; an
        architecture or feature that is not built; a broken file; missing, unknown or misshapen tensors, all
        named in one sentence; a tied model whose output matrix in the file differs from its embedding.
    """
    return read(path, dtype=dtype, place=lambda _, leaf: jnp.asarray(leaf))


def read(
    path: str | os.PathLike, *, dtype: str, place: Callable[[tuple[str, ...], np.ndarray], Any]
) -> tuple[ModelConfig, Params]:
    """`load`, but each stacked leaf becomes `place(tree path, host array)` as soon as it is read.

    Host memory holds one leaf at a time, and what `place` keeps.
    """
    with _opened(path, dtype) as (config, files):
        try:
            leaves = {
                tensor.path: place(tensor.path, hf_weights.read_leaf(tensor, config, files, dtype))
                for tensor in hf_format.tensors(config)
            }
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return config, traverse_util.unflatten_dict(leaves)


def check(path: str | os.PathLike, *, dtype: str = "float32") -> ModelConfig:
    """The config, after every check of `load`; reads only the headers of the weight files."""
    with _opened(path, dtype) as (config, _):
        return config


@contextlib.contextmanager
def _opened(path: str | os.PathLike, dtype: str) -> Iterator[tuple[ModelConfig, hf_weights.Files]]:
    """The config of a directory and its weights by name, all checked and open within the block."""
    directory = pathlib.Path(path)
    config = read_config(directory, dtype=dtype)
    with contextlib.ExitStack() as stack:
        files = hf_weights.open_files(directory, stack)
        hf_weights.check(config, files, directory)
        yield config, files


def save(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer_from: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    to_host: Callable[[Any], np.ndarray] = np.asarray,
) -> None:
    """Writes a directory that `load` and transformers read: config.json, safetensors, the tokenizer's files.

    The directory appears whole or not at all: everything is written beside `path` and renamed at the end. A
    directory that an earlier `save` wrote is replaced; any other directory that is not empty is refused.

    Args:
      path: the directory to make.
      config: its `dtype` is not written; config.json gets the type of the weights.
      params: in either layout; a tied head is written once, as the embedding.
      tokenizer_from: directory whose tokenizer files and generation_config.json are copied.
      dtype: type of the weights written; by default each keeps its own.
      max_shard_bytes: weights beyond this size are cut into several files with an index.
      to_host: turns a leaf of `params` into a host array. It is called once for each leaf, in the order of
        `leaves`, and the array is dropped before the next call, so that a gather here needs host memory for
        one leaf alone.

    Raises:
      UserError: a directory that may not be replaced, or no tokenizer in `tokenizer_from`.
      ValueError: parameters that do not fit `config`. Nothing is written in either case.
    """
    if dtype is not None:
        _check_dtype(dtype)
    hf_weights.check_params(config, params)
    copied = [] if tokenizer_from is None else hf_directory.tokenizer_files(pathlib.Path(tokenizer_from))
    with hf_directory.replaced(path) as partial:
        saved_dtype = dtype or str(params["embed"]["embedding"].dtype)
        files.write_json(partial / _CONFIG, hf_format.config_to_json(config, saved_dtype))
        tensors = hf_weights.stored(config, params, dtype, to_host)
        hf_weights.write_files(partial, tensors, hf_weights.sizes(config, params, dtype), max_shard_bytes)
        hf_directory.copy(copied, partial)


def locate(
    name_or_dir: str | os.PathLike, revision: str | None = None, *, weights: bool = True
) -> pathlib.Path:
    """The local directory of a model: `name_or_dir` itself, or a snapshot of that name from the hub.

    Without `weights` only the small files are downloaded, which suffice for `read_config` and the tokenizer.

    Raises:
      UserError: neither a directory nor a model that the hub gives out; or a revision of a local directory.
    """
    directory = pathlib.Path(name_or_dir)
    if directory.is_dir():
        sentence = f"{name_or_dir} is a local directory, which has no revision {revision!r}: leave it out"
        require(revision is None, sentence)
        return directory
    import huggingface_hub  # not at the top: it is slow to import, and a local directory needs none of it
    from huggingface_hub import errors

    patterns = [*hf_directory.TOKENIZER_FILES, _CONFIG, hf_directory.GENERATION, peft.CONFIG]
    patterns += ["model*.safetensors", hf_weights.INDEX, peft.WEIGHTS] if weights else []
    at = "" if revision is None else f" at revision {revision!r}"
    with explained(
        (errors.HFValidationError, errors.HfHubHTTPError, OSError),
        f"{name_or_dir} is neither a directory nor a model{at} that the Hugging Face hub gives out here",
        "check the spelling, the connection and (for gated models) the login",
    ):
        name = str(name_or_dir)
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    return pathlib.Path(found)


def read_config(path: str | os.PathLike, *, dtype: str = "float32") -> ModelConfig:
    """The ModelConfig of a directory, without its weights; errors as for `load`, naming the file."""
    _check_dtype(dtype)
    directory = pathlib.Path(path)
    require(directory.is_dir(), f"{directory} is no directory: give that of a Hugging Face checkpoint")
    file, half = directory / _CONFIG, "it is no Hugging Face checkpoint, or half-downloaded"
    require(file.is_file(), f"{directory} has no {_CONFIG}: {half}")
    require(
        not (directory / peft.CONFIG).exists(),
        f"{directory} holds {peft.CONFIG}, an adapter; name its directory by model.adapter, and that of "
        "its base model, without the adapter, by model.path",
    )
    raw = files.read_json(file, hf_weights.REMEDY)
    defaults = directory / hf_directory.GENERATION
    generation = files.read_json(defaults, hf_weights.REMEDY) if defaults.is_file() else {}
    try:
        return hf_format.config_from_json(raw, generation, dtype)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _check_dtype(dtype: str) -> None:
    known = hf_weights.DTYPES.values()
    require(dtype in known, f"dtype must be one of {', '.join(known)}, not {dtype!r}")


def leaves(config: ModelConfig, params: Params) -> Iterator[Any]:
    """The leaves of `params` in the order in which `save` gives them to its `to_host`.

    A gather over several processes runs in all of them: those that do not save go through the same leaves.
    """
    for tensor in hf_format.tensors(config):
        yield from hf_weights.leaves(tensor, params)
