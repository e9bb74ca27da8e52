"""The model of a run: where its files are, what they say without the weights, and its parameters at any step.

Owns the search for the starting model (a directory, a hub name, a warm start), reading parameters onto a mesh
and writing them to a directory. Must not know what the parameters are used for.
"""

import dataclasses
import functools
import hashlib
import operator
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax import files
from ngrpo_jax.choices import WARM_START
from ngrpo_jax.errors import UserError, require
from ngrpo_jax.model import decoder, hf, lora, peft
from ngrpo_jax.model.config import Lora, ModelConfig
from ngrpo_jax.runtime import distributed, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.runtime.steps import ReplacedError
from ngrpo_jax.schema import flatten
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.resume import changes
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo, make_tokenizer_info
from ngrpo_jax.setup.warm_start import RECIPE, recipe
from ngrpo_jax.tasks import prompts


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The model that a run starts from, without its weights, which `load_params` reads.

    Attributes:
      directory: a Hugging Face directory.
      adapter: a directory of PEFT, whose adapter the run starts from.
      seed: of fresh adapters.
    """

    directory: str
    config: ModelConfig
    tokenizer_info: TokenizerInfo
    adapter: str | None = None
    seed: int = 0


def as_trained(config: ModelConfig, settings: Settings) -> ModelConfig:
    """The model as a run with these settings trains it: its compute dtype, its adapters.

    Raises:
      UserError: `lora.targets` that match nothing, or a rank above a matrix's size.
    """
    config, own = dataclasses.replace(config, dtype=settings.model.dtype), settings.lora
    if own.rank is None:
        return config
    adapters = Lora(own.rank, own.scale, lora.find_targets(config, own.targets), own.init)
    lora.check_rank(config, adapters)
    return dataclasses.replace(config, lora=adapters)


def locate_adapter(settings: Settings, config: ModelConfig) -> str | None:
    """The directory of `model.adapter`, None without one.

    Raises:
      UserError: no such adapter, one of another base, or another than `lora.*` says.
    """
    if settings.model.adapter is None:
        return None
    directory = hf.locate(settings.model.adapter)
    found = peft.check(directory, config)
    if config.lora is not None:
        lora.check_same(config.lora, found, str(directory))
    return str(directory)


def open_model_spec(settings: Settings, workdir: pathlib.Path) -> ModelSpec:
    """The model of an existing run; UserError where it starts from a warm start that was never made."""
    directory = locate_model(settings, workdir)
    require(directory.is_dir(), f"{workdir} holds no run of this config yet; train it first.")
    tokenizer = prompts.load_tokenizer(directory)
    config = as_trained(hf.read_config(directory), settings)
    info, adapter = make_tokenizer_info(tokenizer, config, settings), locate_adapter(settings, config)
    return ModelSpec(str(directory), config, info, adapter, settings.seed)


def load_params(model_spec: ModelSpec, devices: jax.sharding.Mesh) -> Any:
    """The starting model's parameters, each leaf put on the mesh as soon as it is read.

    float32; under adapters the base is in the compute dtype.
    """
    config = model_spec.config
    shardings = mesh.param_shardings(devices, decoder.parameter_shapes(config))

    def put(path: tuple[str, ...], leaf: np.ndarray) -> jax.Array:
        return mesh.put(leaf, functools.reduce(operator.getitem, path, shardings))

    dtype = "float32" if config.lora is None else config.dtype
    base = hf.read(model_spec.directory, dtype=dtype, place=put)[1]
    if model_spec.adapter is None:
        if config.lora is None:
            return base
        draw = jax.jit(decoder.fresh_adapters, static_argnums=1, out_shardings=lora.split(shardings)[0])
        return lora.joined(base, draw(jax.random.key(model_spec.seed), config))
    found, read = peft.read(model_spec.adapter, config, fingerprint(base))
    shapes = decoder.parameter_shapes(dataclasses.replace(config, lora=found))
    of_adapters = lora.split(mesh.param_shardings(devices, shapes))[0]
    params = lora.joined(base, jax.tree.map(mesh.put, read, of_adapters))
    return params if config.lora is not None else merged(params, dataclasses.replace(config, lora=found))


def merged(params: Any, config: ModelConfig) -> Any:
    """`lora.merged` on the mesh: each matrix stays split as it is. `params` where there are no adapters."""
    of_base = jax.tree.map(lambda leaf: leaf.sharding, lora.split(params)[1])
    merge = jax.jit(lora.merged, static_argnums=1, out_shardings=of_base)
    return params if config.lora is None else merge(params, config)


def fingerprint(base: Any) -> str:
    """Of the weights of a base model: their dtype, and the sum of all. Every process calls this."""
    return f"{base['embed']['embedding'].dtype}:{int(_sum_of_bits(base)):08x}"


def save_model(model_spec: ModelSpec, params: Any, directory: pathlib.Path, *, merge: bool = False) -> None:
    """Writes parameters as a Hugging Face directory in `model.dtype`; adapters as a directory of PEFT.

    The first process writes. Every process calls this, since gathering a leaf that is split over hosts takes
    all of them. Each has one leaf in host memory at a time, and the first also the tensors of the file that
    it writes.

    Args:
      merge: write the base with the adapters merged into it, and not the adapters.
    """
    config = model_spec.config
    if config.lora is not None and not merge:
        adapters, base = lora.split(params)
        host, digest = jax.tree.map(mesh.to_host, adapters), fingerprint(base)
        if distributed.process().primary:
            peft.save(directory, config, host, base=model_spec.directory, fingerprint=digest)
        return
    params, config = merged(params, config), dataclasses.replace(config, lora=None)
    if distributed.process().primary:
        source = model_spec.directory
        hf.save(directory, config, params, tokenizer_from=source, dtype=config.dtype, to_host=mesh.to_host)
        return
    for leaf in hf.leaves(config, params):
        mesh.to_host(leaf)


def locate_model(settings: Settings, workdir: pathlib.Path, *, weights: bool = True) -> pathlib.Path:
    """The directory of the starting model; one that does not exist is a warm start that is to be made.

    Args:
      weights: whether a model of the hub is fetched whole, or without its weights (`hf.locate`).

    Raises:
      UserError: no such model, or a warm start that other settings made.
    """
    if settings.model.path != WARM_START:
        return hf.locate(settings.model.path, settings.model.revision, weights=weights)
    directory = workdir / "warm_start"
    if directory.exists():
        made_by = files.read_json(workdir / RECIPE)
        changed = "; ".join(changes(flatten(made_by), recipe(settings)))
        require(not changed, f"{directory} was made with {changed}; use those or another --workdir.")
    elif (workdir / "checkpoints").exists():
        raise UserError(
            f"{workdir} has checkpoints but not the warm start that they began from; use another --workdir."
        )
    elif not settings.data.train.startswith("arithmetic"):
        raise UserError(
            f"model.path is {WARM_START!r}, which learns worked solutions of arithmetic problems, but "
            f"data.train is {settings.data.train!r}; use an arithmetic source or another model.path."
        )
    return directory


def model_identity(model_spec: ModelSpec, params: Any) -> dict[str, Any]:
    """What differs between two starting models: sizes, a digest of some weights, and a sum of all.

    Every process calls this.
    """
    sizes = dataclasses.asdict(model_spec.config)
    del sizes["dtype"]
    trained, base = lora.split(params)
    digest = hashlib.sha256()
    for leaf in (params["embed"]["embedding"][:64], params["final_norm"]["scale"]):
        digest.update(mesh.to_host(leaf).astype(np.float32).tobytes())
    if base:  # which adapters do not change
        digest.update(int(_sum_of_bits(trained)).to_bytes(4, "little"))
    return {**sizes, "weights": digest.hexdigest()[:16], "sum_of_weights": int(_sum_of_bits(params))}


@jax.jit
def _sum_of_bits(params: Any) -> jax.Array:
    """The sum of all weights in float32 taken as whole numbers, modulo 2^32: equal on every mesh."""
    wide = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    leaves = [jax.lax.bitcast_convert_type(leaf, jnp.uint32) for leaf in wide]
    return sum((jnp.sum(leaf, dtype=jnp.uint32) for leaf in leaves), jnp.uint32(0))


def open_checkpoint(
    model_spec: ModelSpec,
    workdir: pathlib.Path,
    devices: jax.sharding.Mesh,
    which: str,
    best: str,
) -> tuple[int, Any]:
    """(step, parameters on the mesh) of a workdir's checkpoint, which under adapters holds these alone.

    Args:
      which: "start" (the starting model), "latest", a step's number, or "best": the latest where no step was
        evaluated, the starting model where there is no checkpoint.
      best: the metric that "best" goes by, from `best_key`.

    Raises:
      UserError: there is no such checkpoint.
    """
    if which == "start":
        return 0, load_params(model_spec, devices)
    with Checkpoints(workdir / "checkpoints", model=None, best=best) as checkpoints:
        while True:
            shapes = decoder.parameter_shapes(model_spec.config)
            on_mesh = mesh.shapes_on(shapes, mesh.param_shardings(devices, shapes))
            wanted = {"train": {"params": lora.split(on_mesh)[0]}}
            try:
                step = _named_step(checkpoints, which, workdir)
                if step is None:
                    return 0, load_params(model_spec, devices)
                restored, _ = checkpoints.restore(step, wanted, partial=True)
                trained = restored["train"]["params"]
                if model_spec.config.lora is None:
                    return step, trained
                return step, lora.joined(lora.split(load_params(model_spec, devices))[1], trained)
            except ReplacedError:
                if which.isdecimal():
                    raise


def _named_step(checkpoints: Checkpoints, which: str, workdir: pathlib.Path) -> int | None:
    """The step that `which` names; None: the starting model. A damaged newest one is warned of and passed."""

    def newest() -> int | None:
        return checkpoints.newest_good(lambda sentence: print(f"warning: {sentence}.", flush=True))

    steps = checkpoints.steps()
    if which == "best":
        return checkpoints.best_step() or newest()
    step = newest() if which == "latest" else int(which) if which.isdecimal() else None
    if step is None or (which != "latest" and step not in steps):
        have = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"--step={which}: {workdir} has checkpoints at steps: {have}; or use best, latest, start."
        )
    return step
