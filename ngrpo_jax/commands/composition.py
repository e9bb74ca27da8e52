"""Settings -> the parts of a run: model, tokenizer, problems, neighbour table, mesh. Shared by the commands.

Everything that can be wrong with them is found here, before anything is written: each refusal is one
sentence.
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
from ngrpo_jax.commands.problems import check_choices, report_unreadable, training_problems
from ngrpo_jax.learner.supervised import train_supervised
from ngrpo_jax.model import attention, columns, decoder, hf
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.runtime import console, distributed, mesh, preflight
from ngrpo_jax.settings import WARM_START, Settings, WarmStartSettings
from ngrpo_jax.tasks import arithmetic, prompts
from ngrpo_jax.tasks.datasets import Problem, load_problems

RECIPE = "warm_start.json"  # beside warm_start/: the settings that made it
ESTIMATE_ERROR = 1.2  # the memory estimate may be a fifth too high


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
            warm_start(settings, config, tokenizer, training, folder, directory)
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


def recipe(settings: Settings) -> dict[str, Any]:
    """Everything that a warm start depends on."""
    data = dataclasses.asdict(settings.data)
    for name in ("eval", "overlap_with", "drop_overlap"):  # an arithmetic source never shares a problem
        del data[name]
    return {"seed": settings.seed, "data": data, "warm_start": dataclasses.asdict(settings.warm_start)}


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


def memory_parts(settings: Settings, config: ModelConfig) -> list[preflight.Part]:
    """What one device holds in this run, by estimate."""
    return preflight.memory_estimate(config, run_shape(settings))


def run_shape(settings: Settings) -> preflight.RunShape:
    """The numbers of a run on these devices that memory depends on."""
    grid, rollout = settings.mesh, settings.rollout
    return preflight.RunShape(
        data=grid.data,
        fsdp=grid.fsdp,
        tensor=grid.tensor,
        rollout_tensor=grid.tensor if settings.rollout.layout == "tensor" else 1,
        rollout_shards=rollout_shards(settings),
        slots=rollout.slots,
        cache_length=settings.data.max_prompt_tokens
        + max(rollout.max_new_tokens, settings.eval.max_new_tokens),
        prefill_rows=max(1, rollout.slots // min(rollout.group, settings.eval.samples)),
        prompt_tokens=settings.data.max_prompt_tokens,
        query_block=columns.QUERY_BLOCK,
        rows_per_device=settings.train.rows_per_device,
        row_tokens=settings.row_tokens,
        logprob_chunk=settings.train.logprob_chunk,
        remat=settings.train.remat,
        attention=attention_name(settings),
        offload=settings.train.offload,
        reference=settings.objective.kl_coef > 0,
        table=settings.mixing.active and settings.mixing.method(()).uses_table,
        # XLA hands the arithmetic on logits to a library there, which keeps each step of it: measured.
        logits_copies=8 if jax.local_devices()[0].platform == "cpu" else 3,
    )


def check_hosts(settings: Settings, hosts: int) -> None:
    """Refuses prompts that cannot be divided evenly over the hosts."""
    for name, value in (
        ("rollout.prompts", settings.rollout.prompts),
        ("train.mini_batch_prompts", settings.train.mini_batch_prompts),
    ):
        if value % hosts:
            raise ValueError(
                f"{name} is {value}, no multiple of the {hosts} processes; each takes an equal share."
            )


def attention_name(settings: Settings) -> str:
    """The learner's attention, "auto" resolved; ValueError where these devices cannot run it."""
    return attention.choose(
        settings.train.attention,
        platform=jax.local_devices()[0].platform,
        row_tokens=settings.row_tokens,
        shared_prefixes=settings.train.share_prompts,
        dtype=settings.model.dtype,
    )


def check_offload(settings: Settings) -> None:
    """Refuses to move arrays to the memory of the host where devices have none of their own."""
    if settings.train.offload == "none":
        return
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if device.platform == "cpu" or "pinned_host" not in kinds:
        raise ValueError(
            f"train.offload is {settings.train.offload!r}, but devices of {device.platform} have no memory "
            "apart from the host's that arrays could be moved out of; set it to none."
        )


def check_sizes(settings: Settings, config: ModelConfig) -> None:
    """Refuses a run longer than the model's positions, or too large for its devices by the estimate."""
    check_positions(settings, config)
    check_memory(settings, config)


def check_positions(settings: Settings, config: ModelConfig) -> None:
    """Refuses a run whose sequences can become longer than the model's positions."""
    longest = settings.data.max_prompt_tokens + max(
        settings.rollout.max_new_tokens, settings.eval.max_new_tokens
    )
    if longest > config.max_positions:
        raise ValueError(
            f"the model has {config.max_positions} positions, but data.max_prompt_tokens with the larger of "
            f"rollout.max_new_tokens and eval.max_new_tokens needs {longest}; lower one of them."
        )


def rollout_shards(settings: Settings) -> int:
    """Parts that the slots of a rollout are split into."""
    grid = settings.mesh
    return grid.data * grid.fsdp * (grid.tensor if settings.rollout.layout == "replicated" else 1)


def available_memory() -> int | None:
    """Bytes that one device of this host may use; None where nobody tells."""
    return preflight.device_memory(jax.local_devices()[0], sharers=jax.local_device_count())


def check_memory(settings: Settings, config: ModelConfig) -> None:
    """Refuses a run that is too large for its devices by the estimate."""
    _refuse_too_large(memory_parts(settings, config))


def _refuse_too_large(parts: list[preflight.Part]) -> None:
    available = available_memory()
    allowed = None if available is None else int(ESTIMATE_ERROR * available)
    problem = preflight.memory_problem(parts, allowed)
    if problem:
        raise ValueError(problem)


def evaluation_memory(settings: Settings, config: ModelConfig) -> list[preflight.Part]:
    """What one device holds while `evaluate` writes responses, by estimate."""
    grid, slots = settings.mesh, settings.rollout.slots
    shape = preflight.RunShape(
        data=grid.data,
        fsdp=grid.fsdp,
        tensor=grid.tensor,
        rollout_tensor=grid.tensor if settings.rollout.layout == "tensor" else 1,
        rollout_shards=rollout_shards(settings),
        slots=slots,
        cache_length=settings.data.max_prompt_tokens + settings.eval.max_new_tokens,
        prefill_rows=max(1, slots // settings.eval.samples),
        prompt_tokens=settings.data.max_prompt_tokens,
        query_block=columns.QUERY_BLOCK,
        rows_per_device=0,
        row_tokens=0,
        logprob_chunk=0,
        remat=settings.train.remat,
        reference=False,
    )
    return preflight.evaluation_estimate(config, shape)


def check_evaluation(settings: Settings, config: ModelConfig) -> None:
    """Refuses an evaluation longer than the model's positions, or too large for its devices."""
    longest = settings.data.max_prompt_tokens + settings.eval.max_new_tokens
    if longest > config.max_positions:
        raise ValueError(
            f"the model has {config.max_positions} positions, but data.max_prompt_tokens with "
            f"eval.max_new_tokens needs {longest}; lower one of them."
        )
    _refuse_too_large(evaluation_memory(settings, config))


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


def warm_start(
    settings: Settings,
    config: ModelConfig,
    tokenizer: Any,
    training: ProblemSet,
    tokenizer_directory: str,
    directory: pathlib.Path,
) -> None:
    """Trains the small model on worked solutions of the training problems; writes an HF directory."""
    examples = [
        (prompt, _worked_ids(tokenizer, problem))
        for problem, prompt in zip(training.problems, training.prompts, strict=True)
    ]
    label = f"warm start on {len(examples)} worked solutions"
    with console.Progress(label, settings.warm_start.steps, "steps") as progress:
        params = train_supervised(
            config,
            examples,
            settings.warm_start,
            seed=settings.seed,
            progress=lambda done, loss: progress.update(done, f"loss {loss:.3f} nats/token"),
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    (directory.parent / RECIPE).write_text(json.dumps(recipe(settings), indent=1) + "\n", encoding="utf-8")
    hf.save(str(directory), config, params, tokenizer_from=tokenizer_directory)


def warm_start_config(settings: WarmStartSettings, tokenizer: Any) -> ModelConfig:
    """A Qwen2 decoder of the asked-for size, with a vocabulary row for each token."""
    return ModelConfig(
        architecture="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        tie_embeddings=True,
        max_positions=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
    )


def _worked_ids(tokenizer: Any, problem: Problem) -> list[int]:
    response = tokenizer.encode(arithmetic.worked_response(problem.problem), add_special_tokens=False)
    return [*response, tokenizer.eos_token_id]
