"""`train --preflight`: the checks of a run before it starts.

Owns what is checked and in which order. Each check calls the code that the run itself would call; nothing is
trained, and nothing stays in the workdir. With several processes each of them checks for itself.
"""

import os
import pathlib
import time
from typing import Any

import jax

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.model import decoder, hf, hf_directory
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import capacity, checklist, environment, fit, memory, programs, slots
from ngrpo_jax.preflight.checklist import Check
from ngrpo_jax.runtime import console, distributed, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.model_spec import as_trained, locate_adapter, locate_model
from ngrpo_jax.setup.problems import ProblemSet, load_set
from ngrpo_jax.setup.resume import best_key, check_resumable
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo, make_tokenizer_info
from ngrpo_jax.setup.warm_start import warm_start_config
from ngrpo_jax.tasks import arithmetic, prompts
from ngrpo_jax.tasks.rewards import Grader

# A response that is equal to its gold answer by algebra alone, so that a grading process has to decide.
ALGEBRA = (r"\boxed{\frac{1}{2}}", "0.5")

Found = tuple[Any, str]  # what a check hands to those that need it, and the remark of its row


def run(config: Any, workdir: pathlib.Path) -> int:
    """Runs all checks and prints their table; the exit status: 0 if all passed, else 2."""
    rows, results = checklist.run_checks(CHECKS, {"config": config, "directory": workdir})
    joined = "processes" in results
    if joined:
        rows = checklist.merge(distributed.allgather("preflight", rows))
    if not joined or distributed.process().primary:
        print(checklist.table(rows), flush=True)
    return 0 if all(row.verdict == checklist.OK for row in rows) else 2


def _settings(config: Any) -> Found:
    return resolve(config), "each is valid"


def _environment() -> Found:
    return environment.check(os.environ)


def _processes(_: Any) -> Found:
    process = distributed.initialize()
    return process, f"{process.count}" if process.several else "this one alone"


def _hosts(settings: Settings, process: distributed.Process) -> Found:
    fit.check_hosts(settings, process.count)
    return process, f"{settings.rollout.prompts // process.count} prompts a step on each"


def _workdir(workdir: pathlib.Path, process: distributed.Process) -> Found:
    problem = None
    try:
        capacity.check_workdir(workdir)
        hf_directory.check_replaceable(workdir / "export")
    except UserError as error:
        problem = error
    distributed.check_shared(workdir)  # every process has to call this, whatever it found before
    if problem is not None:
        raise problem
    return workdir, "can be written" + (" by all, and is shared" if process.several else "")


def _mesh(settings: Settings, _: Any) -> Found:
    grid = settings.mesh
    devices = mesh.make_mesh(grid.data, grid.fsdp, grid.tensor)
    kind = mesh.device_of(devices).device_kind
    return devices, f"data {grid.data} × fsdp {grid.fsdp} × tensor {grid.tensor} on {kind}"


def _model(settings: Settings, workdir: pathlib.Path) -> Found:
    """(directory, ModelConfig); no config where a warm start would make the model."""
    directory = locate_model(settings, workdir)
    if not directory.is_dir():
        return (directory, None), f"{directory}, to be made by a warm start"
    return (directory, hf.check(directory, dtype=settings.model.dtype)), str(directory)


def _tokenizer(settings: Settings, model: tuple[pathlib.Path, ModelConfig | None]) -> Found:
    directory, config = model
    tokenizer = prompts.load_tokenizer(arithmetic.TOKENIZER if config is None else directory)
    text = prompts.user_text("1 + 1 = ?", settings.data.prompt)
    data = settings.data
    chat = data.chat_template, data.system_prompt, data.template_options
    ids = prompts.encode_prompt(tokenizer, text, *chat)
    return tokenizer, f"{len(tokenizer)} tokens; a prompt ends {tokenizer.decode(ids)[-24:]!r}"


def _sizes(settings: Settings, model: tuple[pathlib.Path, ModelConfig | None], tokenizer: Any) -> Found:
    config = model[1] or warm_start_config(settings.warm_start, tokenizer)
    config = as_trained(config, settings)
    fit.check_positions(settings, config)
    locate_adapter(settings, config)
    count = console.format_count(decoder.parameter_count(config))
    trained = console.format_count(decoder.trained_count(config))
    adapters = "" if config.lora is None else f" and {trained} of adapters"
    return config, f"{config.architecture}, {count} parameters{adapters}, {config.max_positions} positions"


def _mixing(settings: Settings, tokenizer: Any, config: ModelConfig) -> Found:
    info = make_tokenizer_info(tokenizer, config, settings)
    mixing = settings.mixing
    what = f"rate {mixing.rate}, k {mixing.k}" if mixing.active else "none"
    return info, f"{what}; {int(info.eligible.valid_V.sum())} usable rows; stops at {info.stop_ids}"


def _held_out_data(settings: Settings, tokenizer: Any) -> Found:
    return _data(settings, tokenizer, "test")


def _training_data(settings: Settings, tokenizer: Any, _: Any) -> Found:
    return _data(settings, tokenizer, "train")


def _data(settings: Settings, tokenizer: Any, split: str) -> Found:
    problems = load_set(settings, tokenizer, split)
    count, longest = len(problems.problems), max(map(len, problems.prompts))
    return problems, f"{count} problems, {problems.dropped} too long; longest {longest} tokens"


def _reward(settings: Settings) -> Found:
    own, (response, gold) = settings.reward, ALGEBRA
    with Grader(1, own.deadline_s, own.memory_mb) as grader:
        grader.check(own.kind)
        require(
            own.kind != "math" or grader.grade([response], [gold], "math") == [1.0],
            f"the grader does not find that {response} is {gold} within reward.deadline_s {own.deadline_s} "
            f"and reward.memory_mb {own.memory_mb}; raise them.",
        )
    return own.kind, f"{own.kind}, {own.workers} grading processes"


def _sharding(devices: jax.sharding.Mesh, config: ModelConfig) -> Found:
    return mesh.param_shardings(devices, decoder.parameter_shapes(config)), "every dimension divides"


def _checkpoints(settings: Settings, config: ModelConfig, workdir: pathlib.Path) -> Found:
    directory, needed = (
        workdir / "checkpoints",
        memory.checkpoint_bytes(config, kept=settings.checkpoint.keep + 1),
    )
    capacity.check_workdir(workdir, 0 if directory.exists() else needed)
    with Checkpoints(directory, model=None, best=best_key(settings)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return step, f"none yet; {console.format_bytes(needed)} have room"
        check_resumable(checkpoints.read_host(step), step, settings, workdir)
    return step, f"step {step} would be resumed"


def _slots(settings: Settings, devices: jax.sharding.Mesh, config: ModelConfig, *sets: ProblemSet) -> Found:
    """The settings with a number of slots."""
    longest, room = max(one.longest_prompt for one in sets), capacity.whole_memory(devices)
    decided = slots.for_training(settings, config, devices, longest, room)
    by_default = "the number of a CPU" if room is None else "as many as fit"
    how = by_default if settings.rollout.slots is None else "as set"
    return decided, f"{decided.rollout.slots} sequences decoded side by side, {how}"


def _memory(settings: Settings, devices: jax.sharding.Mesh, config: ModelConfig) -> Found:
    fit.check_offload(settings, devices)
    fit.check_decode_attention(settings, config, devices)
    allocations = fit.check_memory(settings, config, devices)
    needed, phase = memory.peak(allocations)
    largest = next(one for one in allocations if one.phase in ("always", phase))
    available = capacity.available_memory(devices)
    room = "unknown" if available is None else console.format_bytes(available)
    return needed, (
        f"about {console.format_bytes(needed)} of {room} on each device, most in the {phase}: "
        f"{console.format_bytes(largest.size)} of {largest.name}"
    )


def _update_programs(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh, _: Any) -> Found:
    return _compiled(programs.update_programs(settings, config, devices))


def _rollout_programs(
    settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh, info: TokenizerInfo, _: Any
) -> Found:
    return _compiled(programs.rollout_programs(settings, config, devices, info))


def _compiled(compile_each: programs.Programs) -> Found:
    begun = time.monotonic()
    compiled = {name: compile_one() for name, compile_one in compile_each.items()}
    seconds = console.format_seconds(time.monotonic() - begun)
    return compiled, f"{len(compiled)} compiled in {seconds}"


CHECKS = (
    Check("settings", _settings, ("config",)),
    Check("environment", _environment),
    Check("processes", _processes, ("environment",)),
    Check("hosts", _hosts, ("settings", "processes")),
    Check("workdir", _workdir, ("directory", "processes")),
    Check("mesh", _mesh, ("settings", "processes")),
    Check("model", _model, ("settings", "directory")),
    Check("tokenizer", _tokenizer, ("settings", "model")),
    Check("sizes", _sizes, ("settings", "model", "tokenizer")),
    Check("mixing", _mixing, ("settings", "tokenizer", "sizes")),
    Check("held-out data", _held_out_data, ("settings", "tokenizer")),
    # Loading the training data compares it with the held-out data, and would repeat a failure of that.
    Check("training data", _training_data, ("settings", "tokenizer", "held-out data")),
    Check("reward", _reward, ("settings",)),
    Check("sharding", _sharding, ("mesh", "sizes")),
    Check("checkpoints", _checkpoints, ("settings", "sizes", "directory")),
    Check("slots", _slots, ("settings", "mesh", "sizes", "held-out data", "training data")),
    Check("memory", _memory, ("slots", "mesh", "sizes")),
    Check("update programs", _update_programs, ("settings", "sizes", "mesh", "sharding")),
    Check("rollout programs", _rollout_programs, ("slots", "sizes", "mesh", "mixing", "sharding")),
)
