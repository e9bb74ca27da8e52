"""`train --preflight`: one row for each thing that has to be right before a run starts, and a verdict on it.

Owns the order of the questions and their table. Each question is asked of the code that the run itself
would use; nothing is trained and nothing stays in the workdir. After a failure the rows that do not depend on
it are still checked. With several processes each asks for itself, and a row fails if it fails for one.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from ngrpo_jax.errors import UserError
from ngrpo_jax.model import decoder, hf
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import capacity, environment, fit, memory, programs
from ngrpo_jax.runtime import console, distributed, ending, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.model_spec import locate_model
from ngrpo_jax.setup.problems import load_set
from ngrpo_jax.setup.resume import best_key, check_resumable
from ngrpo_jax.setup.tokenizer_info import make_tokenizer_info
from ngrpo_jax.setup.warm_start import warm_start_config
from ngrpo_jax.tasks import arithmetic, prompts
from ngrpo_jax.tasks.rewards import Grader

OK, FAILED, SKIPPED = "ok", "FAILED", "not checked"
SMOKE = (r"\boxed{\frac{1}{2}}", "0.5")  # takes a grading process to decide


@dataclasses.dataclass
class Checklist:
    """Rows so far, and what their questions have found, by the row's name."""

    rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def ask(self, name: str, question: Callable[..., tuple[Any, str]], *needs: str) -> None:
        """Adds a row: `question`, given what the rows in `needs` found, returns its own find and a remark."""
        missing = [need for need in needs if need not in self.found]
        if missing:
            self.rows.append((name, SKIPPED, f"needs {', '.join(missing)}"))
            return
        try:
            self.found[name], remark = question(*(self.found[need] for need in needs))
        except (
            Exception
        ) as error:  # a fault of any kind is a verdict, and the other rows are still to be asked
            kind = (
                "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: "
            )
            self.rows.append((name, FAILED, kind + " ".join(str(error).split())[:400]))
        else:
            self.rows.append((name, OK, remark))


def run(config: Any, workdir: pathlib.Path) -> int:
    """Asks everything and prints the table; the exit status: 2 if any row failed, else 0."""
    checks = Checklist()
    checks.ask("settings", lambda: (resolve(config), "each is valid"))
    checks.ask("environment", lambda: environment.check(os.environ))
    checks.ask("processes", _processes, "environment")
    _ask_about_the_run(checks, workdir)
    rows = _of_all_processes(checks)
    ending.say_goodbye()
    if "processes" not in checks.found or distributed.process().primary:
        print(console.table(rows, ("check", "verdict", "")))
        failed = sum(verdict == FAILED for _, verdict, _ in rows)
        print(
            f"\n{failed} of {len(rows)} checks failed."
            if failed
            else "\nNothing stands in the way of this run."
        )
    return 2 if any(verdict != OK for _, verdict, _ in rows) else 0


def _ask_about_the_run(checks: Checklist, workdir: pathlib.Path) -> None:
    ask = checks.ask
    ask("hosts", _hosts, "settings", "processes")
    ask("workdir", lambda _: _workdir(workdir), "processes")
    ask("mesh", lambda settings, _: _mesh(settings), "settings", "processes")
    ask("model", lambda settings: _model(settings, workdir), "settings")
    ask("tokenizer", _tokenizer, "settings", "model")
    ask("sizes", _sizes, "settings", "model", "tokenizer")
    ask("mixing", _language, "settings", "tokenizer", "sizes")
    ask("held-out data", lambda s, t: _data(s, t, "test"), "settings", "tokenizer")
    # What is trained on is compared with what is held out, and so has to wait for it.
    ask("training data", lambda s, t, _: _data(s, t, "train"), "settings", "tokenizer", "held-out data")
    ask("reward", _reward, "settings")
    ask("sharding", _sharding, "mesh", "sizes")
    ask("checkpoints", lambda s, c: _checkpoints(s, c, workdir), "settings", "sizes")
    ask("memory", _memory, "settings", "mesh", "sizes")
    ask("update programs", programs.compile_update, "settings", "sizes", "mesh", "sharding")
    needs = ("settings", "sizes", "mesh", "mixing", "sharding")
    ask("rollout programs", programs.compile_rollout, *needs)


def _of_all_processes(checks: Checklist) -> list[tuple[str, str, str]]:
    """Each row with the worst verdict of any process, which it names where there are several."""
    if "processes" not in checks.found or not distributed.process().several:
        return checks.rows
    merged = []
    for rows in zip(*distributed.allgather("preflight", checks.rows), strict=True):
        index, (name, verdict, remark) = max(
            enumerate(rows), key=lambda entry: ((OK, SKIPPED, FAILED).index(entry[1][1]), -entry[0])
        )
        merged.append((name, verdict, remark if verdict == OK else f"process {index}: {remark}"))
    return merged


def _processes(_: Any) -> tuple[Any, str]:
    process = distributed.initialize()
    return process, f"{process.count}" if process.several else "this one alone"


def _hosts(settings: Settings, process: distributed.Process) -> tuple[Any, str]:
    fit.check_hosts(settings, process.count)
    return process, f"{settings.rollout.prompts // process.count} prompts a step on each"


def _workdir(workdir: pathlib.Path) -> tuple[Any, str]:
    problem = None
    try:
        capacity.check_workdir(workdir)
        hf.check_replaceable(workdir / "export")
    except ValueError as error:
        problem = error
    distributed.check_shared(workdir)  # every process has to come here, whatever it found before
    if problem is not None:
        raise problem
    several = distributed.process().several
    return workdir, "can be written" + (" by all, and is shared" if several else "")


def _mesh(settings: Settings) -> tuple[Any, str]:
    grid = settings.mesh
    devices = mesh.make_mesh(grid.data, grid.fsdp, grid.tensor)
    device = jax.local_devices()[0]
    return devices, f"data {grid.data} × fsdp {grid.fsdp} × tensor {grid.tensor} on {device.device_kind}"


def _model(settings: Settings, workdir: pathlib.Path) -> tuple[Any, str]:
    directory = locate_model(settings, workdir)
    if not directory.is_dir():
        return (directory, None), f"{directory}, to be made by a warm start"
    return (directory, hf.check(directory, dtype=settings.model.dtype)), str(directory)


def _tokenizer(settings: Settings, model: tuple[pathlib.Path, Any]) -> tuple[Any, str]:
    directory, config = model
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            arithmetic.make_tokenizer(folder)
        tokenizer = prompts.load_tokenizer(folder if config is None else directory)
    text = prompts.user_text("1 + 1 = ?", settings.data.prompt)
    ids = prompts.encode_prompt(tokenizer, text, settings.data.chat_template)
    return tokenizer, f"{len(tokenizer)} tokens; a prompt ends {tokenizer.decode(ids)[-24:]!r}"


def _sizes(settings: Settings, model: tuple[pathlib.Path, Any], tokenizer: Any) -> tuple[Any, str]:
    config = model[1] or warm_start_config(settings.warm_start, tokenizer)
    config = dataclasses.replace(config, dtype=settings.model.dtype)
    fit.check_positions(settings, config)
    count = console.format_count(decoder.parameter_count(config))
    return config, f"{config.architecture}, {count} parameters, {config.max_positions} positions"


def _language(settings: Settings, tokenizer: Any, config: ModelConfig) -> tuple[Any, str]:
    tokenizer_info = make_tokenizer_info(tokenizer, config, settings)
    what = f"rate {settings.mixing.rate}, k {settings.mixing.k}" if settings.mixing.active else "none"
    return (
        tokenizer_info,
        f"{what}; {int(tokenizer_info.usable_V.sum())} usable rows; stops at {tokenizer_info.stop_ids}",
    )


def _data(settings: Settings, tokenizer: Any, split: str) -> tuple[Any, str]:
    problems = load_set(settings, tokenizer, split)
    longest = max(map(len, problems.prompts))
    return (
        problems,
        f"{len(problems.problems)} problems, {problems.dropped} too long; longest {longest} tokens",
    )


def _reward(settings: Settings) -> tuple[Any, str]:
    own = settings.reward
    with Grader(1, own.deadline_s, own.memory_mb) as grader:
        grader.check(own.kind)
        if own.kind == "math" and grader.grade([SMOKE[0]], [SMOKE[1]], "math") != [1.0]:
            raise UserError(
                f"the grader does not see that {SMOKE[0]} is {SMOKE[1]} within reward.deadline_s "
                f"{own.deadline_s} and reward.memory_mb {own.memory_mb}; raise them."
            )
    return own.kind, f"{own.kind}, {own.workers} grading processes"


def _sharding(devices: jax.sharding.Mesh, config: ModelConfig) -> tuple[Any, str]:
    return mesh.param_shardings(devices, decoder.parameter_shapes(config)), "every dimension divides"


def _checkpoints(settings: Settings, config: ModelConfig, workdir: pathlib.Path) -> tuple[Any, str]:
    directory = workdir / "checkpoints"
    needed = 0 if directory.exists() else memory.checkpoint_bytes(config, kept=2)
    capacity.check_workdir(workdir, needed)
    with Checkpoints(directory, model=None, best=best_key(settings)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return (
                step,
                f"none yet; {console.format_bytes(memory.checkpoint_bytes(config, kept=2))} have room",
            )
        check_resumable(checkpoints.read_host(step), step, settings, workdir)
    return step, f"step {step} would be resumed"


def _memory(settings: Settings, _: Any, config: ModelConfig) -> tuple[Any, str]:
    fit.check_offload(settings)
    fit.check_memory(settings, config)
    allocations = fit.training_memory(settings, config)
    needed, phase = memory.peak(allocations)
    largest = max((one for one in allocations if one.phase in ("always", phase)), key=lambda one: one.size)
    available = capacity.available_memory()
    room = "unknown" if available is None else console.format_bytes(available)
    return needed, (
        f"about {console.format_bytes(needed)} of {room} on each device, most in the {phase}: "
        f"{console.format_bytes(largest.size)} of {largest.name}"
    )
