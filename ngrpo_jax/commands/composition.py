"""Settings -> the parts of a run: model, tokenizer, problems, neighbour table. Shared by the commands.

Owns the order in which they are found and checked: everything that can be wrong with them is, before anything
is written, and each refusal is one sentence. Must not know how a run is found to fit (fit.py), nor how a
warm start is made (warm_start.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from ngrpo_jax.algo import refresh
from ngrpo_jax.algo.eligible import Eligible, eligible_rows
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.commands.fit import attention_name, check_offload, check_sizes
from ngrpo_jax.commands.problems import check_choices, report_unreadable, training_problems
from ngrpo_jax.commands.warm_start import RECIPE, recipe, warm_start, warm_start_config
from ngrpo_jax.model import decoder, hf
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.runtime import distributed, mesh, preflight
from ngrpo_jax.settings import WARM_START, Settings
from ngrpo_jax.tasks import arithmetic, prompts
from ngrpo_jax.tasks.datasets import Problem, load_problems


@dataclasses.dataclass(frozen=True)
class Language:
    """What the tokenizer says: how responses stop, when mixing ends, which rows may be neighbours."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    mixing: Mixing
    usable_V: np.ndarray
    spelling_V: np.ndarray | None  # rows of equal entries are no neighbours of one another

    @functools.cached_property
    def eligible(self) -> Eligible:
        """Which rows may be whose neighbours; ValueError where that leaves some row too few."""
        return eligible_rows(len(self.usable_V), self.mixing.k, self.usable_V, self.spelling_V)


@dataclasses.dataclass(frozen=True)
class Source:
    """The model that a run starts from, without its weights: `load_params` reads those."""

    directory: str
    config: ModelConfig
    language: Language


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """Problems with their encoded prompts, in the same order, and how many prompts were too long."""

    problems: list[Problem]
    prompts: list[list[int]]
    dropped: int


def make_language(tokenizer: Any, config: ModelConfig, settings: Settings) -> Language:
    """Reads off the tokenizer what rollouts need; ValueError where k is larger than the usable vocabulary."""
    rows, mixing = config.vocab_size, settings.mixing
    usable_V = prompts.usable_rows(tokenizer, rows)
    keep_out_ids: tuple[int, ...] = ()
    if mixing.active and mixing.keep_out is not None:
        kept_out_V = prompts.matching_rows(tokenizer, mixing.keep_out, rows)
        keep_out_ids = tuple(np.flatnonzero(kept_out_V).tolist())
        usable_V &= ~kept_out_V
    if mixing.active and mixing.k > usable_V.sum():
        raise ValueError(
            f"mixing.k is {mixing.k}, but only {int(usable_V.sum())} rows of the vocabulary can be "
            "neighbours; lower mixing.k" + (", or narrow mixing.keep_out." if keep_out_ids else ".")
        )
    spelling_V = prompts.spelling_groups(tokenizer, rows) if mixing.distinct_spelling else None
    until = prompts.until_ids(tokenizer, mixing.until) if mixing.until else ()
    language = Language(
        tokenizer,
        prompts.stop_ids(tokenizer, config.eos_token_ids),
        mixing.method(until, keep_out_ids),
        usable_V,
        spelling_V,
    )
    if mixing.active and spelling_V is not None:
        try:
            language.eligible  # noqa: B018  (found once, here, and kept)
        except ValueError as error:
            raise ValueError(f"mixing.{error}; lower mixing.k or unset mixing.distinct_spelling.") from None
    return language


def compose(
    settings: Settings, workdir: pathlib.Path, devices: jax.sharding.Mesh
) -> tuple[Source, ProblemSet, ProblemSet]:
    """The model, the training problems and the held-out ones; no weights are read yet, for they take longest.

    Nor are they fetched from the hub before everything else is known to be right.

    With model.path "warm-start" and none made yet, the model is trained here, into WORKDIR/warm_start, and
    that is the only thing that is written; of several processes the first one does it, and the others wait.
    """
    directory = locate_model(settings, workdir, weights=False)
    made = directory.is_dir()
    with tempfile.TemporaryDirectory() as folder:
        if not made:
            arithmetic.make_tokenizer(folder)
        tokenizer = prompts.load_tokenizer(directory if made else folder)
        config = hf.read_config(directory) if made else warm_start_config(settings.warm_start, tokenizer)
        config = dataclasses.replace(config, dtype=settings.model.dtype)
        language = make_language(tokenizer, config, settings)
        mesh.param_shardings(devices, parameter_shapes(config))  # refuses axes that do not divide the model
        attention_name(settings)
        check_offload(settings)
        check_sizes(settings, config)
        begun = (workdir / "checkpoints").exists()  # then the disk already holds what it has to
        preflight.check_workdir(workdir, 0 if begun else preflight.checkpoint_bytes(config, kept=2))
        training = load_set(settings, tokenizer, "train")
        held_out = load_set(settings, tokenizer, "test")
        here = distributed.place()
        if made:
            directory = locate_model(settings, workdir)
        elif here.primary:
            warm_start(settings, config, tokenizer, training.problems, training.prompts, folder, directory)
        distributed.exchange("the starting model is there", None)
    return Source(str(directory), config, language), training, held_out


def open_source(settings: Settings, workdir: pathlib.Path) -> Source:
    """The model of an existing run, without its weights; ValueError where a warm start was never made."""
    directory = locate_model(settings, workdir)
    if not directory.is_dir():
        raise ValueError(f"{workdir} holds no run of this config yet; train it first.")
    tokenizer = prompts.load_tokenizer(directory)
    config = hf.read_config(directory, dtype=settings.model.dtype)
    return Source(str(directory), config, make_language(tokenizer, config, settings))


def load_params(source: Source, devices: jax.sharding.Mesh) -> Any:
    """The starting model's float32 parameters, each leaf put on the mesh as soon as it is read."""
    shardings = mesh.param_shardings(devices, parameter_shapes(source.config))

    def place(path: tuple[str, ...], leaf: np.ndarray) -> jax.Array:
        return mesh.put(leaf, functools.reduce(operator.getitem, path, shardings))

    return hf.read(source.directory, dtype="float32", place=place)[1]


def locate_model(settings: Settings, workdir: pathlib.Path, *, weights: bool = True) -> pathlib.Path:
    """The directory of the starting model; one that does not exist is a warm start still to be made.

    `weights`: as `hf.locate` takes it.
    """
    if settings.model.path != WARM_START:
        return hf.locate(settings.model.path, settings.model.revision, weights=weights)
    directory = workdir / "warm_start"
    if directory.exists():
        made_by = json.loads((workdir / RECIPE).read_text(encoding="utf-8"))
        if made_by != recipe(settings):
            raise ValueError(
                f"{directory} was made by other settings of seed, data or warm_start, listed in "
                f"{workdir / RECIPE}; use those, or another --workdir."
            )
    elif (workdir / "checkpoints").exists():
        raise ValueError(
            f"{workdir} has checkpoints but not the warm start that they began from; use another --workdir."
        )
    elif not settings.data.train.startswith("arithmetic"):
        raise ValueError(
            f"model.path is {WARM_START!r}, which learns worked solutions of arithmetic problems, but "
            f"data.train is {settings.data.train!r}; use an arithmetic source or another model.path."
        )
    return directory


def load_set(settings: Settings, tokenizer: Any, split: str) -> ProblemSet:
    """Problems and prompts of `data.train` ("train") or `data.eval` ("test"), less the too long.

    Of the training set, empty and repeated rows are left out too, and with `data.drop_overlap` what stands in
    an evaluation set. Whatever was left out or looks wrong is printed.
    """
    data = settings.data
    source = data.train if split == "train" else data.eval
    check_choices(settings, source)
    if split == "train":
        problems = training_problems(settings)
    else:
        problems = load_problems(source, split=split, seed=settings.seed, size=settings.eval.problems)
    report_unreadable(settings, source, problems)
    kept, encoded, dropped = prompts.encode_problems(
        tokenizer, problems, data.prompt, data.chat_template, data.max_prompt_tokens
    )
    return ProblemSet(kept, encoded, dropped)


def parameter_shapes(config: ModelConfig) -> Any:
    """The learner's parameter tree as jax.ShapeDtypeStruct, float32."""
    return jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0))


def table_upkeep(source: Source, devices: jax.sharding.Mesh) -> refresh.Upkeep:
    """How the neighbour table of these settings is made and kept: on all devices."""
    mixing = source.language.mixing
    return refresh.Upkeep(mixing.k, mixing.metric, devices)


def build_table(params: Any, source: Source, devices: jax.sharding.Mesh) -> jax.Array | None:
    """The neighbour table of these parameters, or None where the strategy mixes without one.

    Special tokens, unused rows and tokens kept out of mixing are nobody's neighbours.
    """
    language, mixing = source.language, source.language.mixing
    if not mixing.uses_table:
        return None
    return neighbor_table(
        decoder.table_rows(params, source.config, mixing.table),
        mixing.k,
        metric=mixing.metric,
        valid_V=language.usable_V,
        group_V=language.spelling_V,
        mesh=devices,
    )


def fingerprint(source: Source, params: Any) -> dict[str, Any]:
    """Facts that tell one starting model from another: sizes, and a digest of some of its weights."""
    facts = dataclasses.asdict(source.config)
    del facts["dtype"]
    digest = hashlib.sha256()
    for leaf in (params["embed"]["embedding"][:64], params["final_norm"]["scale"]):
        digest.update(mesh.to_host(leaf).astype(np.float32).tobytes())
    return {**facts, "weights": digest.hexdigest()[:16]}
