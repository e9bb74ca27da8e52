"""The tables of docs/launch.md: what fits on which slice, and what a run may cost there.

    python -m docs.launch_tables

writes them anew between their marks, from the root of the repository. Memory is that of preflight/memory.py,
for the paper's settings; hours follow from the makers' figures for the chips and two shares of them that are
assumed. It stands beside the document it belongs to; tests/test_launch_tables.py holds the two together.
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
from ngrpo_jax.runtime.hardware import PEAK_FLOPS
from ngrpo_jax.settings import MeshSettings, Settings, resolve

DOCUMENT = pathlib.Path(__file__).parent / "launch.md"
BEGIN = "<!-- {}: written by python -m docs.launch_tables -->"
END = "<!-- end of {} -->"
GIB = 1024**3
FULL = 0.85  # of a device's memory: the estimate may be 15 % too low

# Assumed of a run, and said in the document.
PROMPT, RESPONSE = 150, 4000  # tokens, on average
BANDWIDTH_SHARE, FLOPS_SHARE = 0.5, 0.35  # of the makers' figures
EVALUATED = 30 * 32  # responses of one evaluation on AIME24


class Slice(NamedTuple):
    """Devices of one kind: GiB of memory of each, bytes a second of it, and its name in PEAK_FLOPS."""

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


class Plan(NamedTuple):
    """A run on a mesh, and the bytes that a device then holds by phase."""

    settings: Settings
    held: dict[str, int]

    @property
    def peak(self) -> int:
        return self.held["always"] + max(size for phase, size in self.held.items() if phase != "always")

    @property
    def mesh(self) -> str:
        return f"{self.settings.mesh.fsdp} × {self.settings.mesh.tensor}"


def plans(config: str, model: ModelConfig, devices: int) -> Iterator[Plan]:
    """Every mesh fsdp × tensor of so many devices that the model can be split over."""
    given = flags.load_config(str(DOCUMENT.parent.parent / "configs" / f"{config}.py"))
    settings = resolve(given)
    for tensor in range(1, model.num_kv_heads + 1):
        if devices % tensor or model.num_kv_heads % tensor:
            continue
        grid = MeshSettings(data=1, fsdp=devices // tensor, tensor=tensor)
        own = dataclasses.replace(settings, mesh=grid)
        allocations = memory.training_estimate(own, model)
        phases = ("always", "table", "rollout", "update")
        yield Plan(own, {phase: memory.held(allocations, phase) for phase in phases})


def best(config: str, model: ModelConfig, where: Slice) -> tuple[Plan, bool]:
    """The mesh that splits least of those that fit, or the one that lacks least; whether it fits."""
    every = list(plans(config, model, where.devices))
    fitting = [plan for plan in every if plan.peak <= FULL * where.memory * GIB]
    return (fitting[0], True) if fitting else (min(every, key=lambda plan: plan.peak), False)


def memory_table() -> str:
    """Markdown: a row a slice, a column a model."""
    lines = ["| slice | devices, GiB each | " + " | ".join(MODELS) + " |", "|---|---|" + "---|" * len(MODELS)]
    for where in SLICES:
        cells = [where.name, f"{where.devices} × {where.memory}"]
        for config, model in MODELS.values():
            plan, fits = best(config, model, where)
            most = ", ".join(f"{name} {plan.held[name] / GIB:.1f}" for name in ("rollout", "update"))
            text = f"{plan.mesh}: always {plan.held['always'] / GIB:.1f}, {most}: **{plan.peak / GIB:.1f}**"
            cells.append(text if fits else f"no; at best {text}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hours(settings: Settings, model: ModelConfig, where: Slice) -> tuple[float, float, float]:
    """Seconds of a step's rollout and of its update, and hours of the whole run."""
    grid, run = settings.mesh, settings.rollout
    compute = 2  # bytes of bfloat16
    slots = run.slots * grid.tensor / where.devices
    cache = compute * 2 * model.num_layers * model.num_kv_heads * model.head_dim * (PROMPT + RESPONSE / 2)
    read = (compute * shapes.weights_read(model) + slots * cache) / grid.tensor
    of_step = read / (BANDWIDTH_SHARE * where.bandwidth)
    sequences = run.prompts * run.group
    rollout = sequences * RESPONSE / run.slots * of_step
    # Old and reference log-probabilities, a forward pass and its repetition, and twice that for gradients.
    work = (1 + 1 + 2 + 2) * sequences * forward_flops(model, PROMPT, RESPONSE)
    update = work / (where.devices * FLOPS_SHARE * PEAK_FLOPS[where.kind])
    assert settings.eval.every is not None
    evaluations = 2 + settings.train.steps // settings.eval.every
    evaluation = EVALUATED * RESPONSE / run.slots * of_step
    return rollout, update, (settings.train.steps * (rollout + update) + evaluations * evaluation) / 3600


def cost_table() -> str:
    """Markdown: a row for each slice and model that fits."""
    lines = ["| slice | model | rollout, s | update, s | hours | chip-hours |", "|---|---|---|---|---|---|"]
    for where in SLICES:
        for name, (config, model) in MODELS.items():
            plan, fits = best(config, model, where)
            if fits:
                rollout, update, whole = hours(plan.settings, model, where)
                figures = (rollout, update, whole, where.devices * whole)
                lines.append(f"| {where.name} | {name} | " + " | ".join(f"{x:.0f}" for x in figures) + " |")
    return "\n".join(lines)


def rewritten(document: str) -> str:
    """The document with today's tables. Raises ValueError where marks are missing."""
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
