"""The tables of accelerators in docs/launch.md and docs/performance.md: what fits, what a run may cost.

    python -m docs.launch_tables

replaces the tables between their marks by what docs/targets.json says (benchmarks/targets.py), which are the
figures of the compilers. Run it from the root of the repository. tests/test_launch_tables.py fails where a
table is out of date.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import shapes, targets
from benchmarks.targets import PHASES, Run
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.flops import forward_flops
from ngrpo_jax.settings import Settings

FOLDER = pathlib.Path(__file__).parent
DATA = FOLDER / "targets.json"
BEGIN = "<!-- {}: written by python -m docs.launch_tables -->"
END = "<!-- end of {} -->"
# Target -> what its slice is called where it is ordered; config -> its model, in a word.
SLICES = {
    "v4:2x2x1": "v4-8",
    "v5e:2x4": "v5litepod-8",
    "v5e:4x4": "v5litepod-16",
    "v5p:2x2x1": "v5p-8",
    "v6e:2x4": "v6e-8",
    "h100:1": "1 × H100",
    "h100:8": "8 × H100",
}
MODELS = {
    "ngrpo_1_5b": "1.5B",
    "ngrpo_7b": "7B",
    "ngrpo_llama_1b": "Llama 1B",
    "ngrpo_qwen3_1_7b": "Qwen3 1.7B",
}

# Assumed of a run; docs/launch.md gives these numbers too.
PROMPT, RESPONSE = 150, 4000  # tokens, on average
FILL = 0.92  # of a packed row is tokens
EVALUATED = 30 * 32  # responses of one evaluation on AIME24
CACHE_SHARE = 0.75  # of the bandwidth, at which TPU kernels read the cache: the compiler takes it of the rest
BANDWIDTH_SHARE, FLOPS_SHARE = 0.5, 0.35  # of GPUs' specifications: their compiler tells no time


class Seconds(NamedTuple):
    """Of a step's rollout and its update, and of the whole run."""

    rollout: float
    update: float
    run: float


def runs() -> list[Run]:
    """What the compilers said, by target and config as the tables have them."""
    found = {(run.target, run.config): run for run in targets.load(DATA)}
    return [found[key] for target in SLICES for config in MODELS if (key := (target, config)) in found]


def memory_table(every: Sequence[Run]) -> str:
    """Markdown: a row a slice, a column a model."""
    found = {(run.target, run.config): run for run in every}
    rows = []
    for target, name in SLICES.items():
        of_target = [found.get((target, config)) for config in MODELS]
        chip = next((run.chip for run in of_target if run is not None), None)
        if chip is not None:
            devices = f"{targets.devices_of(target)} × {chip.memory_gib}"
            rows.append((name, devices, *map(_held, of_target)))
    return _markdown(("slice", "devices, GiB each", *MODELS.values()), rows)


def _held(run: Run | None) -> str:
    if run is None:
        return "–"
    _, fsdp, tensor = run.mesh
    if not run.rows:
        return f"no; at best {fsdp} × {tensor}: **{run.estimate_gib:.1f}** by estimate"
    held = {phase: row["total_gib"] for phase in PHASES if (row := run.largest(phase))}
    parts = ", ".join(f"{phase} {size:.1f}" for phase, size in held.items())
    failed = "no; " if any(row["problem"] for row in run.rows) else ""
    return f"{failed}{fsdp} × {tensor}: {parts}: **{max(held.values()):.1f}**"


def fits(run: Run) -> bool:
    """Whether every program compiles and fits."""
    return bool(run.rows) and not any(row["problem"] for row in run.rows)


def cost_table(every: Sequence[Run]) -> str:
    """Markdown: a row for each slice and model that fits."""
    rows = []
    for run in filter(fits, every):
        seconds, devices = cost(run), targets.devices_of(run.target)
        hours = seconds.run / 3600
        figures = (seconds.rollout, seconds.update, hours, devices * hours)
        rows.append((SLICES[run.target], MODELS[run.config], *(f"{figure:.0f}" for figure in figures)))
    return _markdown(("slice", "model", "rollout, s", "update, s", "hours", "chip-hours"), rows)


def cost(run: Run) -> Seconds:
    """Seconds of a step and of the run, for the lengths that are assumed above."""
    settings = targets.settings_of(run.config)
    model = targets.model_of(settings)
    of_step = decode_seconds(run, settings, model)
    sequences = settings.rollout.prompts * settings.rollout.group
    rollout = sequences * RESPONSE / settings.rollout.slots * of_step
    update = update_seconds(run, settings, model)
    assert settings.eval.every is not None
    evaluations = 2 + settings.train.steps // settings.eval.every
    evaluation = EVALUATED * RESPONSE / settings.rollout.slots * of_step
    steps = settings.train.steps
    return Seconds(rollout, update, steps * (rollout + update) + evaluations * evaluation)


def decode_seconds(run: Run, settings: Settings, model: ModelConfig) -> float:
    """Of one decode step with all slots busy: by the compiler and the cache's bytes, or by bytes alone."""
    row, tensor = run.row("training decode_chunk"), run.mesh[2]
    slots = settings.rollout.slots * tensor / targets.devices_of(run.target)
    cache = slots * shapes.cache_bytes(model) * (PROMPT + RESPONSE / 2) / tensor
    bandwidth, chunk = run.chip.bandwidth or 0, settings.rollout.chunk
    assert row is not None
    linked = 1e9 * row["collective_gb"] / chunk / (run.chip.links or 1)
    if row["milliseconds"] is None:
        weights = 2 * shapes.weights_read(model) / tensor
        return (weights + cache) / (BANDWIDTH_SHARE * bandwidth) + linked
    return row["milliseconds"] / 1e3 / chunk + cache / (CACHE_SHARE * bandwidth) + linked


def update_seconds(run: Run, settings: Settings, model: ModelConfig) -> float:
    """Of a step's update, collectives and kernels after everything else; or by operations and collectives."""
    data, fsdp, _ = run.mesh
    tokens = settings.rollout.prompts * settings.rollout.group * (PROMPT + RESPONSE)
    microbatch = data * fsdp * settings.train.rows_per_device * settings.row_tokens * FILL
    passes = [row for row in run.rows if row["program"].startswith(tuple(targets.PASSES))]
    linked = sum(1e9 * row["collective_gb"] for row in passes) / (run.chip.links or 1)
    if any(row["milliseconds"] is None for row in passes):
        # Forward passes: old and reference log-probabilities, two with full remat, two as much as gradients.
        work = (1 + 1 + 2 + 2) * tokens / (PROMPT + RESPONSE) * forward_flops(model, PROMPT, RESPONSE)
        devices = targets.devices_of(run.target)
        return work / (devices * FLOPS_SHARE * run.chip.flops) + tokens / microbatch * linked
    kernels = sum(targets.products_ms(run, row)[1] for row in passes)  # type: ignore[index]
    told = sum(row["milliseconds"] for row in passes)
    # Attention's work as if each row were one sequence; those of a packed row are shorter.
    shorter = (PROMPT + RESPONSE) / settings.row_tokens
    return tokens / microbatch * ((told + shorter * kernels) / 1e3 + linked)


def learner_table(every: Sequence[Run]) -> str:
    """Markdown: what the compilers say of a microbatch."""
    headers, rows, _ = targets.learner_table(every)
    return _markdown(headers, [[_cell(value) for value in row] for row in rows])


def estimate_table(every: Sequence[Run]) -> str:
    """Markdown: what each phase holds, and the estimate over it."""
    headers, rows, _ = targets.fitting_table(every)
    return _markdown(headers, [[_cell(value) for value in row] for row in rows])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Document -> name of a table in it -> what makes it.
TABLES: dict[str, dict[str, Callable[[Sequence[Run]], str]]] = {
    "launch.md": {"memory": memory_table, "cost": cost_table},
    "performance.md": {"targets": learner_table, "fitting": estimate_table},
}


def rewritten(name: str, document: str) -> str:
    """The document with up-to-date tables. Raises ValueError where marks are missing."""
    every = runs()
    for table, make in TABLES[name].items():
        begin, end = BEGIN.format(table), END.format(table)
        if begin not in document or end not in document:
            raise ValueError(f"{name} has lost the marks of its table of {table}, {begin} and {end}")
        before, _, rest = document.partition(begin)
        document = f"{before}{begin}\n\n{make(every)}\n\n{end}{rest.partition(end)[2]}"
    return document


if __name__ == "__main__":
    for name in TABLES:
        path = FOLDER / name
        path.write_text(rewritten(name, path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the tables of {path}", file=sys.stderr)
