"""The tables of docs/launch.md: what fits on which slice, and what a run may cost there.

    python -m docs.launch_tables

replaces the tables between their marks. Run it from the root of the repository. Memory is the estimate of
preflight/memory.py for the paper's settings; hours follow from the makers' specifications of the chips, of
which two shares are assumed to be reached. tests/test_launch_tables.py fails where a table is out of date.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import shapes
from ngrpo_jax import flags
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.flops import forward_flops
from ngrpo_jax.preflight import memory
from ngrpo_jax.runtime.hardware import CHIPS
from ngrpo_jax.settings import MeshSettings, Settings, resolve

DOCUMENT = pathlib.Path(__file__).parent / "launch.md"
BEGIN = "<!-- {}: written by python -m docs.launch_tables -->"
END = "<!-- end of {} -->"
GIB = 1024**3
FULL = 0.85  # of a device's memory may be taken: the estimate may be 15 % too low

# Assumed of a run; the document gives these numbers too.
PROMPT, RESPONSE = 150, 4000  # tokens, on average
BANDWIDTH_SHARE, FLOPS_SHARE = 0.5, 0.35  # of the makers' specifications
EVALUATED = 30 * 32  # responses of one evaluation on AIME24


class Slice(NamedTuple):
    """Devices of one kind: GiB of memory of each, bytes a second of it, and its name in CHIPS."""

    name: str
    devices: int
    memory: int
    bandwidth: float
    kind: str


SLICES = (
    Slice("v4-8", 4, 32, 1228e9, "TPU v4"),
    Slice("v5litepod-8", 8, 16, 819e9, "TPU v5e"),
    Slice("v5litepod-16", 16, 16, 819e9, "TPU v5e"),
    Slice("v5p-8", 4, 95, 2765e9, "TPU v5p"),
    Slice("v6e-8", 8, 32, 1640e9, "TPU v6e"),
    Slice("8 × H100", 8, 80, 3350e9, "NVIDIA H100"),
    Slice("8 × H200", 8, 141, 4800e9, "NVIDIA H200"),
)
MODELS = {"1.5B": ("ngrpo_1_5b", shapes.SHAPES["r1-1.5b"]), "7B": ("ngrpo_7b", shapes.SHAPES["r1-7b"])}


class MeshChoice(NamedTuple):
    """A run on a mesh, and what a device then holds."""

    settings: Settings
    allocations: list[memory.Allocation]

    @property
    def peak(self) -> int:
        """The most bytes that a device holds at one time."""
        return memory.peak(self.allocations)[0]

    def __str__(self) -> str:
        grid = self.settings.mesh
        always, rollout, update = (
            memory.held(self.allocations, phase) / GIB for phase in ("always", "rollout", "update")
        )
        return (
            f"{grid.fsdp} × {grid.tensor}: always {always:.1f}, rollout {rollout:.1f}, update {update:.1f}: "
            f"**{self.peak / GIB:.1f}**"
        )


def choices(config: str, model: ModelConfig, devices: int) -> Iterator[MeshChoice]:
    """Every mesh fsdp × tensor of so many devices that the model can be split over."""
    settings = resolve(flags.load_config(str(DOCUMENT.parent.parent / "configs" / f"{config}.py")))
    for tensor in range(1, model.num_kv_heads + 1):
        if devices % tensor or model.num_kv_heads % tensor:
            continue
        grid = MeshSettings(data=1, fsdp=devices // tensor, tensor=tensor)
        own = dataclasses.replace(settings, mesh=grid)
        yield MeshChoice(own, memory.training_estimate(own, model))


def best(config: str, model: ModelConfig, where: Slice) -> tuple[MeshChoice, bool]:
    """(the mesh that splits products least of those that fit, True), or (the smallest, False)."""
    every = list(choices(config, model, where.devices))
    fitting = [choice for choice in every if choice.peak <= FULL * where.memory * GIB]
    return (fitting[0], True) if fitting else (min(every, key=lambda choice: choice.peak), False)


def memory_table() -> str:
    """Markdown: a row a slice, a column a model."""
    lines = ["| slice | devices, GiB each | " + " | ".join(MODELS) + " |", "|---|---|" + "---|" * len(MODELS)]
    for where in SLICES:
        cells = [where.name, f"{where.devices} × {where.memory}"]
        for config, model in MODELS.values():
            choice, fits = best(config, model, where)
            cells.append(f"{choice}" if fits else f"no; at best {choice}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hours(settings: Settings, model: ModelConfig, where: Slice) -> tuple[float, float, float]:
    """(seconds of a step's rollout, seconds of its update, hours of the whole run)."""
    grid, run = settings.mesh, settings.rollout
    compute = 2  # bytes of bfloat16
    slots = run.slots * grid.tensor / where.devices
    cache = compute * 2 * model.num_layers * model.num_kv_heads * model.head_dim * (PROMPT + RESPONSE / 2)
    read = (compute * shapes.weights_read(model) + slots * cache) / grid.tensor
    of_step = read / (BANDWIDTH_SHARE * where.bandwidth)
    sequences = run.prompts * run.group
    rollout = sequences * RESPONSE / run.slots * of_step
    # Forward passes: old and reference log-probabilities, two with full remat, two as much as gradients.
    work = (1 + 1 + 2 + 2) * sequences * forward_flops(model, PROMPT, RESPONSE)
    update = work / (where.devices * FLOPS_SHARE * CHIPS[where.kind].flops)
    assert settings.eval.every is not None
    evaluations = 2 + settings.train.steps // settings.eval.every
    evaluation = EVALUATED * RESPONSE / run.slots * of_step
    return rollout, update, (settings.train.steps * (rollout + update) + evaluations * evaluation) / 3600


def cost_table() -> str:
    """Markdown: a row for each slice and model that fits."""
    lines = ["| slice | model | rollout, s | update, s | hours | chip-hours |", "|---|---|---|---|---|---|"]
    for where in SLICES:
        for name, (config, model) in MODELS.items():
            choice, fits = best(config, model, where)
            if fits:
                rollout, update, whole = hours(choice.settings, model, where)
                cells = (rollout, update, whole, where.devices * whole)
                lines.append(f"| {where.name} | {name} | " + " | ".join(f"{x:.0f}" for x in cells) + " |")
    return "\n".join(lines)


def rewritten(document: str) -> str:
    """The document with up-to-date tables. Raises ValueError where marks are missing."""
    for name, table in (("memory", memory_table), ("cost", cost_table)):
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in document or end not in document:
            raise ValueError(f"{DOCUMENT} has lost the marks of its table of {name}, {begin} and {end}")
        before, _, rest = document.partition(begin)
        document = f"{before}{begin}\n\n{table()}\n\n{end}{rest.partition(end)[2]}"
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the tables of {DOCUMENT}", file=sys.stderr)
