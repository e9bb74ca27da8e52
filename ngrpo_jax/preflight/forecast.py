"""`train --preflight --target`: every program of a run, compiled for devices that need not be here.

Owns which programs there are, what a device holds beside each, and their rows. Reads config.json of the
model, no weights; nothing is run. Where the model's folder has no tokenizer, all rows of the vocabulary are
taken as usable, and lengths are the settings' limits.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from ngrpo_jax import files
from ngrpo_jax.algo.neighbors.eligibility import eligible_rows
from ngrpo_jax.choices import WARM_START
from ngrpo_jax.errors import require
from ngrpo_jax.model import hf
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import fit, memory, program_text, programs, slots, targets
from ngrpo_jax.runtime import console, hardware, mesh
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.learner import attention_name
from ngrpo_jax.setup.model_spec import as_trained
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo, make_tokenizer_info
from ngrpo_jax.setup.warm_start import warm_start_config
from ngrpo_jax.tasks import arithmetic, prompts

GIB = 2**30
_QUIET_S = 10.0  # after so long without a line, what is being compiled is told
_REMEDIES = {
    "update": "lower train.rows_per_device, set train.remat to full, or raise mesh.fsdp",
    "rollout": "lower rollout.slots, or raise mesh.fsdp",
    "table": "raise mesh.fsdp",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A program on a device of the target; sizes in GiB, `collective_gb` in 1e9 bytes.

    Attributes:
      compiled: whether the compiler took it.
      waiting_gib: what else the device holds while the program runs.
      total_gib: arguments, results that are no argument's place, temporaries, and what waits.
      device_gib: of a device of the target.
      collective_gb: bytes that collectives give back on a device.
      milliseconds: the compiler's estimate, without collectives and Pallas kernels; None where it has none.
      phase: of a step, in which the program runs.
      estimate_gib: the most that a device holds in that phase, as preflight/memory.py has it.
      problem: why the run cannot be, and the setting to change; None where all is well.
    """

    program: str
    compiled: bool
    seconds: float
    phase: str | None = None
    estimate_gib: float | None = None
    argument_gib: float | None = None
    temporary_gib: float | None = None
    waiting_gib: float | None = None
    total_gib: float | None = None
    device_gib: float | None = None
    collective_gb: float | None = None
    milliseconds: float | None = None
    attention: str | None = None
    problem: str | None = None


def run(config: Any, target: str, json_file: str | None) -> int:
    """Compiles, prints a row as each program ends; the exit status: 0 if all compile and fit, else 2."""
    settings, grid = resolve(config), config.mesh
    every = targets.devices(target)
    devices = mesh.make_mesh(grid.data, grid.fsdp, grid.tensor, every)
    of_host, host = targets.host_devices(target, every), None
    if of_host is not every:
        host = mesh.make_mesh(len(of_host) // grid.tensor, 1, grid.tensor, of_host)
    model, info = read_model(settings)
    hosts, kind = mesh.hosts(devices), mesh.device_of(devices).device_kind
    fit.check_hosts(settings, hosts)
    fit.check_positions(settings, model)
    chip, longest = hardware.chip(mesh.device_of(devices)), settings.data.max_prompt_tokens
    room = None if chip is None or chip.memory_gib is None else int(chip.memory_gib * GIB)
    settings = slots.for_training(settings, model, devices, longest, room)
    print(
        f"{target}: {devices.size} × {kind} on {hosts} host(s), data {grid.data} × fsdp "
        f"{grid.fsdp} × tensor {grid.tensor}; {console.format_count(memory.parameter_count(model))} "
        f"parameters; attention {attention_name(settings, devices)}; "
        f"{settings.rollout.slots} slots",
        flush=True,
    )
    rows = compiled(work(settings, model, devices, info, host))
    if json_file is not None:
        files.write_json(pathlib.Path(json_file), [dataclasses.asdict(row) for row in rows])
    print(f"The most that a device holds, by estimate in brackets, GiB: {_most_held(rows)}.")
    failed = [row for row in rows if row.problem]
    print(f"{len(failed)} of {len(rows)} programs fail." if failed else "Every program compiles and fits.")
    for sentence in _proposals(settings, model, devices, rows):
        print(sentence)
    return 2 if failed else 0


def read_model(settings: Settings) -> tuple[ModelConfig, TokenizerInfo]:
    """The sizes of the model, and its tokenizer's ids and masks; without a tokenizer, all rows as usable."""
    if settings.model.path == WARM_START:
        tokenizer = prompts.load_tokenizer(arithmetic.TOKENIZER)
        config = warm_start_config(settings.warm_start, tokenizer)
    else:
        directory = hf.locate(settings.model.path, settings.model.revision, weights=False)
        config, tokenizer = hf.read_config(directory), None
        if (directory / "tokenizer.json").is_file():
            tokenizer = prompts.load_tokenizer(directory)
    config = as_trained(config, settings)
    if tokenizer is not None:
        return config, make_tokenizer_info(tokenizer, config, settings)
    print(f"{settings.model.path} has no tokenizer: all rows are taken as usable, lengths as the limits are.")
    eligible = eligible_rows(config.vocab_size, settings.mixing.k if settings.mixing.active else 1)
    return config, TokenizerInfo(None, config.eos_token_ids, settings.mixing.method(()), eligible)


def work(
    settings: Settings,
    model: ModelConfig,
    devices: jax.sharding.Mesh,
    info: TokenizerInfo,
    host: jax.sharding.Mesh | None = None,
) -> dict[str, Callable[[], Row]]:
    """The programs of a run by name; what is called compiles one, and says what a device then holds.

    Args:
      host: of rollouts, as `programs.rollout_programs` takes it.
    """
    chip = _chip(mesh.device_of(devices))
    allocations = fit.training_memory(settings, model, devices)
    phases: dict[memory.Phase, programs.Programs] = {
        "update": programs.update_programs(settings, model, devices),
        "table": programs.table_programs(settings, model, devices, info),
        "rollout": programs.rollout_programs(settings, model, devices, info, host),
    }
    found: dict[str, Callable[[], Row]] = {}
    for phase, compile_each in phases.items():
        held = memory.held(allocations, "always") + memory.held(allocations, phase)
        name = attention_name(settings, devices) if phase == "update" else None
        for program, compile_one in compile_each.items():
            row = Row(program, False, 0.0, phase, held / GIB, device_gib=chip.memory_gib, attention=name)
            waiting = _waiting(program, settings, model)
            found[program] = functools.partial(_compile, row, compile_one, waiting, chip.clock)
    return found


def compiled(work: Mapping[str, Callable[[], Row]]) -> list[Row]:
    """The rows, by as many threads as there are cores, at most four: compilers hold gigabytes each.

    Prints a row as its program ends, and at least every `_QUIET_S` seconds which are being compiled.
    """
    begun, started, rows = time.monotonic(), {}, {}

    def one(program: str) -> Row:
        started[program] = time.monotonic()
        return work[program]()

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        pending = {pool.submit(one, program) for program in work}
        while pending:
            ended, pending = concurrent.futures.wait(
                pending, _QUIET_S, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                row = future.result()
                rows[row.program] = row
                print(_line(row), flush=True)
            if not ended:
                running = ", ".join(program for program in started if program not in rows)
                print(f"  {time.monotonic() - begun:.0f} s: compiling {running}", flush=True)
    return [rows[program] for program in work]


def _chip(device: jax.Device) -> hardware.Chip:
    chip = hardware.chip(device)
    known = chip is not None and chip.memory_gib is not None
    require(known, f"the memory of {device.device_kind} is unknown")
    assert chip is not None
    return chip


def _compile(
    row: Row, compile_one: Callable[[], jax.stages.Compiled], waiting: int, clock: float | None
) -> Row:
    """The row with what the compiler says.

    Args:
      waiting: bytes that a device holds beside the program.
      clock: GHz of the compiler's cycles; None where it tells none.
    """
    begun = time.monotonic()
    assert row.phase is not None and row.device_gib is not None
    remedy = _REMEDIES[row.phase]
    try:
        compiled = compile_one()
    except Exception as error:  # of any kind: what the compiler raises is the answer
        said = " ".join(str(error).split())[:300]
        problem = f"does not compile ({said}); {remedy}"
        return dataclasses.replace(row, seconds=time.monotonic() - begun, problem=problem)
    sizes: Any = compiled.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total = (needed + sizes.temp_size_in_bytes + waiting) / GIB
    cost = program_text.cost(compiled.as_text() or "")
    return dataclasses.replace(
        row,
        compiled=True,
        seconds=time.monotonic() - begun,
        argument_gib=sizes.argument_size_in_bytes / GIB,
        temporary_gib=sizes.temp_size_in_bytes / GIB,
        waiting_gib=waiting / GIB,
        total_gib=total,
        collective_gb=sum(cost.collective_bytes.values()) / 1e9,
        milliseconds=cost.cycles / clock / 1e6 if clock else None,
        problem=f"needs {total:.1f} GiB; {remedy}" if total > row.device_gib else None,
    )


def _waiting(program: str, settings: Settings, model: ModelConfig) -> int:
    """Bytes that a device holds while a program runs that does not take them as arguments."""
    held = {one.name.partition(",")[0]: one for one in memory.training_estimate(settings, model)}
    reads = {
        "accumulate": ("master", "base"),
        "score float32": ("master", "base"),
        "apply": ("master", "Adam"),
        "training copy_layer": ("master", "base"),
        "evaluation copy_layer": ("master", "base"),
    }
    own = reads.get(program, ("reference",) if program.startswith("score") else ())
    waiting = sum(
        one.size for name, one in held.items() if one.phase == "always" and name.partition(" ")[0] not in own
    )
    if (rows := held.get("embedding before the update")) is not None:
        # Kept from the first gradient on, and a part of the master parameters that the table is made of.
        waiting += {"accumulate": 1, "zeros": 1, "apply": 1, "table": -1}.get(program, 0) * rows.size
    if program.startswith(("training", "evaluation")):
        shares = _waiting_in_rollout(program.partition(" ")[2], model)
        names = ("rollout copy", "KV cache", "keys and values of prefilled prompts")
        waiting += sum(int(share * held[name].size) for share, name in zip(shares, names, strict=True))
    return waiting


def _waiting_in_rollout(kind: str, model: ModelConfig) -> tuple[float, float, float]:
    """Shares of the copy of the parameters, of the cache, and of the prompts' keys and values."""
    whole, rows = memory.parameter_count(model), model.vocab_size * model.hidden_size
    layer = (whole - (1 if model.tie_embeddings else 2) * rows) / model.num_layers
    return {
        "copy_layer": (1 - layer / whole, 0.0, 0.0),
        "prefill_begin": (1 - rows / whole, 1.0, 0.0),
        "prefill_layer": (1 - layer / whole, 1.0, 1 - 1 / model.num_layers),
        "prefill_end": (1.0, 1.0, 1.0),
        "empty": (1.0, 0.0, 0.0),
        "insert": (1.0, 0.0, 0.0),
        "decode_chunk": (0.0, 0.0, 1.0),
    }[kind]


def _line(row: Row) -> str:
    if not row.compiled:
        return f"{row.program:24s} {row.seconds:5.0f} s  FAILED: {row.problem}"
    time_ms = "" if row.milliseconds is None else f"  {row.milliseconds:7.1f} ms"
    return (
        f"{row.program:24s} {row.seconds:5.0f} s  arguments {row.argument_gib:6.2f}  temporary "
        f"{row.temporary_gib:6.2f}  waiting {row.waiting_gib:6.2f}  in all {row.total_gib:6.2f} of "
        f"{row.device_gib:.2f} GiB  collectives {row.collective_gb:6.2f} GB{time_ms}  "
        f"{'ok' if row.problem is None else 'FAILED: ' + row.problem}"
    )


def _most_held(rows: Sequence[Row]) -> str:
    """The largest program of each phase, in words."""
    largest: dict[str, Row] = {}
    for row in rows:
        if row.phase is not None and row.total_gib is not None:
            largest[row.phase] = max(largest.get(row.phase, row), row, key=lambda one: one.total_gib or 0)
    return ", ".join(
        f"{phase} {row.total_gib:.2f} ({row.estimate_gib:.2f})" for phase, row in largest.items()
    )


def _proposals(
    settings: Settings, model: ModelConfig, devices: jax.sharding.Mesh, rows: list[Row]
) -> Iterator[str]:
    """The largest settings that fit, by the estimate of memory, corrected by the compiled programs."""
    measured = [row for row in rows if row.total_gib is not None]
    if not measured:
        return
    room = GIB * (measured[0].device_gib or 0)

    def phase(changed: Settings, name: memory.Phase) -> int:
        allocations = fit.training_memory(changed, model, devices)
        return memory.held(allocations, "always") + memory.held(allocations, name)

    def most(name: str) -> float:
        return GIB * max((row.total_gib or 0 for row in measured if row.phase == name), default=0)

    def fits(changed: Settings, name: memory.Phase) -> bool:
        return phase(changed, name) * most(name) / phase(settings, name) <= room

    def train(**change: Any) -> Settings:
        return dataclasses.replace(settings, train=dataclasses.replace(settings.train, **change))

    of_rows = [count for count in range(1, 65) if fits(train(rows_per_device=count), "update")]
    of_slots = [n for n in (2**i * 8 for i in range(13)) if fits(settings.with_slots(n), "rollout")]
    remats = [name for name in ("none", "dots", "full") if fits(train(remat=name), "update")]
    found = {
        "train.rows_per_device": max(of_rows, default=None),
        "rollout.slots": max(of_slots, default=None),
        "train.remat": next(iter(remats), None),
    }
    told = ", ".join(f"{name} {'–' if value is None else value}" for name, value in found.items())
    yield f"The most that fits, each changed alone: {told} (slots in powers of two; – nothing fits)."
