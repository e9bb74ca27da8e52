"""Hugging Face directories: loads a model from one, saves a model as one, finds one by its hub name.

Owns the directory as a whole. The tables of hf_format.py describe config.json and the tensors; hf_weights.py
reads and writes the weights. Supports safetensors alone, and must not need torch.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ngrpo_jax import files
from ngrpo_jax.errors import UserError, explained, require, storage
from ngrpo_jax.model import hf_format, hf_weights
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import Params

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_ADAPTER = "adapter_config.json"  # of PEFT
_RECEIPT = ".ngrpo_export.json"  # lists the files of `save`: a later save replaces only those


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
    target = pathlib.Path(os.path.abspath(path))
    check_replaceable(target)
    copied = [] if tokenizer_from is None else _tokenizer_files(pathlib.Path(tokenizer_from))
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    remove_remains(target)
    try:
        with storage(target, "written"):
            partial.mkdir(parents=True)
            saved_dtype = dtype or str(params["embed"]["embedding"].dtype)
            files.write_json(partial / _CONFIG, hf_format.config_to_json(config, saved_dtype))
            tensors = hf_weights.stored(config, params, dtype, to_host)
            hf_weights.write_files(partial, tensors, hf_weights.sizes(config, params, dtype), max_shard_bytes)
            for file in copied:
                shutil.copyfile(file, partial / file.name)
            written = sorted(file.name for file in partial.iterdir())
            files.write_json(partial / _RECEIPT, {"files": written})
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_remains(path: str | os.PathLike) -> None:
    """Removes what a `save` to `path` has left half-written whose process was killed, or is this one."""
    target = pathlib.Path(os.path.abspath(path))
    for kind in ("partial", "replaced"):
        for folder in target.parent.glob(f".{target.name}.{kind}-*"):
            process = folder.name.rpartition("-")[2]
            if process == str(os.getpid()) or not pathlib.Path("/proc", process).exists():
                shutil.rmtree(folder, ignore_errors=True)


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

    patterns = [*TOKENIZER_FILES, _CONFIG, _GENERATION, _ADAPTER]
    patterns += ["model*.safetensors", hf_weights.INDEX] if weights else []
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
        not (directory / _ADAPTER).exists(),
        f"{directory} holds {_ADAPTER}: an adapter's weights are not read; merge it into the model first",
    )
    raw = files.read_json(file, hf_weights.REMEDY)
    defaults = directory / _GENERATION
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


def check_replaceable(path: str | os.PathLike) -> None:
    """UserError unless `path` is absent, empty, or holds only files that an earlier `save` wrote there."""
    target = pathlib.Path(path)
    if not target.exists():
        return
    require(target.is_dir(), f"{target} is a file: name a directory to save to")
    present = {file.name for file in target.iterdir()} - {_RECEIPT}
    receipt = target / _RECEIPT
    known = files.read_json(receipt)["files"] if receipt.is_file() else []
    foreign = sorted(present - set(known))
    require(
        not foreign,
        f"{target} holds {', '.join(foreign)}, which no earlier save wrote there: "
        "name another directory, or empty this one",
    )


def _tokenizer_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The files of `source` that go with the weights."""
    present = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    wanted = ", ".join(TOKENIZER_FILES)
    require(bool(present), f"{source} holds no tokenizer file ({wanted}): name the directory of one")
    generation = source / _GENERATION
    return [*present, generation] if generation.is_file() else present
