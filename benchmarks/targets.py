"""What the compilers say of runs on machines that are not here: memory, collectives, estimated time.

    python benchmarks/targets.py [--configs=NAME,NAME] [--targets=TARGET,TARGET] [--json=FILE]

By default the paper's four models on every one of TARGETS, which takes hours; the extras aot-tpu and
aot-cuda12 install the compilers. No model is read: its sizes are those of shapes.py. Each run is compiled in
a process of its own by `train --preflight --target`, on the mesh of `choose`. Runs that FILE has already are
not compiled again. `python -m docs.launch_tables` makes the tables of the documents of docs/targets.json:

    python benchmarks/targets.py --json=docs/targets.json && python -m docs.launch_tables
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from benchmarks import measure, shapes
from ngrpo_jax import flags
from ngrpo_jax.model import hf_format
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import memory
from ngrpo_jax.runtime.hardware import CHIPS, Chip
from ngrpo_jax.settings import MeshSettings, Settings, resolve

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ("ngrpo_1_5b", "ngrpo_7b", "ngrpo_llama_1b", "ngrpo_qwen3_1_7b")
TARGETS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1", "v4:2x2x1", "v5e:4x4", "h100:1", "h100:8")
KINDS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "h100": "NVIDIA H100"}
SLOTS = 64  # of every run, so that targets can be compared: by itself a run takes as many as fit
GIB = 2**30
PHASES: tuple[memory.Phase, ...] = ("update", "rollout", "table")
# Forward passes over the layers, over the head, and over attention, as whose work a program counts: full
# remat repeats the layers, and a kernel's backward pass computes the scores again.
PASSES = {"accumulate": (4, 3, 4.5), "score": (1, 1, 1)}


class Run(NamedTuple):
    """A config on a target: the mesh that it is compiled for, and the rows of `train --preflight --target`.

    Attributes:
      mesh: data, fsdp, tensor.
      estimate_gib: the most that a device holds, by the estimate of memory.
      rows: none where by estimate no mesh has the memory.
    """

    config: str
    target: str
    mesh: tuple[int, int, int]
    estimate_gib: float
    rows: list[dict[str, Any]]

    def largest(self, phase: str) -> dict[str, Any] | None:
        """The program of a phase that needs most memory; None where none was compiled."""
        rows = [row for row in self.rows if row["phase"] == phase and row["total_gib"] is not None]
        return max(rows, key=lambda row: row["total_gib"], default=None)

    def estimates(self) -> dict[str, float]:
        """GiB that a device holds in each phase, by the estimate of memory."""
        settings = settings_of(self.config)
        data, fsdp, tensor = self.mesh
        grid = MeshSettings(data=data, fsdp=fsdp, tensor=tensor)
        parts = _estimated(settings, model_of(settings), grid, self.target)
        always = memory.held(parts, "always")
        return {phase: (always + memory.held(parts, phase)) / GIB for phase in PHASES}

    def row(self, name: str) -> dict[str, Any] | None:
        """The row of the first program whose name contains `name`."""
        return next((row for row in self.rows if name in row["program"]), None)

    @property
    def chip(self) -> Chip:
        """What a device of the target has."""
        return CHIPS[KINDS[self.target.partition(":")[0]]]


def main() -> None:
    """Compiles what FILE does not have, and prints two tables."""
    given = _arguments()
    jax.config.update("jax_platforms", "cpu")  # the report's line on this machine asks jax for its devices
    kept = {(run.config, run.target): run for run in (load(given.json) if given.json else [])}
    wanted = [(config, target) for target in given.targets for config in given.configs]
    for config, target in wanted:
        if (config, target) not in kept:
            measure.say(f"{config} on {target}")
            kept[config, target] = _compiled(config, target, given.set, given.layers)
            if given.json:
                save(given.json, list(kept.values()))
    report, runs = measure.Report("Targets"), [kept[each] for each in wanted]
    report.table("Runs", *fitting_table(runs))
    report.table("Programs of the learner", *learner_table(runs))


def load(path: str | pathlib.Path) -> list[Run]:
    """The runs that a file holds; none where it is missing."""
    path = pathlib.Path(path)
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [Run(**{**row, "mesh": tuple(row["mesh"])}) for row in rows]


def save(path: str | pathlib.Path, runs: Sequence[Run]) -> None:
    """Writes the runs to a file, a line for each program."""

    def rounded(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    texts = []
    for run in runs:
        rows = [
            # The estimate is no figure of a compiler: it is computed where it is told.
            json.dumps({name: rounded(value) for name, value in row.items() if name != "estimate_gib"})
            for row in run.rows
        ]
        head = json.dumps({**run._asdict(), "estimate_gib": rounded(run.estimate_gib), "rows": None})
        texts.append(head.replace("null}", "[" + ",".join(f"\n  {row}" for row in rows) + "]}"))
    pathlib.Path(path).write_text("[\n" + ",\n".join(texts) + "\n]\n", encoding="utf-8")


def settings_of(config: str) -> Settings:
    """The settings of a file in configs/, with `SLOTS`."""
    return resolve(flags.load_config(str(ROOT / "configs" / f"{config}.py"))).with_slots(SLOTS)


def model_of(settings: Settings) -> ModelConfig:
    """The sizes of the model that these settings name."""
    return shapes.SHAPES[shapes.OF_PATH[settings.model.path]]


def devices_of(target: str) -> int:
    """How many devices a target has."""
    return math.prod(map(int, target.partition(":")[2].split("x")))


def choose(settings: Settings, model: ModelConfig, target: str) -> tuple[MeshSettings, float]:
    """(the mesh fsdp × tensor with the least tensor that fits by the estimate, GiB that a device then holds).

    Where none fits, the one that needs least.
    """
    devices, found = devices_of(target), []
    for tensor in range(1, model.num_kv_heads + 1):
        if devices % tensor or model.num_kv_heads % tensor:
            continue
        grid = MeshSettings(data=1, fsdp=devices // tensor, tensor=tensor)
        found.append((grid, memory.peak(_estimated(settings, model, grid, target))[0] / GIB))
    room = CHIPS[KINDS[target.partition(":")[0]]].memory_gib or 0
    return next((each for each in found if each[1] <= room), min(found, key=lambda each: each[1]))


def _estimated(
    settings: Settings, model: ModelConfig, grid: MeshSettings, target: str
) -> list[memory.Allocation]:
    """What a device of the target holds in a run on this mesh."""
    of_tpu = KINDS[target.partition(":")[0]].startswith("TPU")
    attention, platform = ("splash", "tpu") if of_tpu else ("cudnn", "gpu")
    own = dataclasses.replace(settings, mesh=grid)
    return memory.training_estimate(own, model, attention=attention, platform=platform)


def products_ms(run: Run, row: dict[str, Any]) -> tuple[float, float] | None:
    """Milliseconds of a microbatch's matrix products at the peak: all but attention's, and attention's.

    Attention's count a row as one sequence. None for programs of the rollout.
    """
    passes = PASSES.get(row["program"].partition(" ")[0])
    if passes is None:
        return None
    settings = settings_of(run.config)
    model, (_, _, tensor) = model_of(settings), run.mesh
    head = model.vocab_size * model.hidden_size
    layers = shapes.matrix_parameters(model) - head
    tokens = settings.train.rows_per_device * settings.row_tokens / tensor
    kernels = passes[2] * tokens * shapes.attention_flops(model, settings.row_tokens)
    work = 2 * tokens * (passes[0] * layers + passes[1] * head)
    return 1e3 * work / run.chip.flops, 1e3 * kernels / run.chip.flops


def fitting_table(runs: Sequence[Run]) -> tuple[Sequence[str], list[Sequence[Any]], str]:
    """Headers, a row for each run, and a note: what it holds in each phase, and how near the estimate is."""
    headers = ("target", "config", "fsdp × tensor", *(f"{phase}, GiB" for phase in PHASES), "of")
    rows = []
    for run in runs:
        estimates = run.estimates()
        cells = [
            "–" if row is None else f"{row['total_gib']:.1f} ({estimates[phase] / row['total_gib']:.2f})"
            for phase in PHASES
            for row in [run.largest(phase)]
        ]
        mesh = f"{run.mesh[1]} × {run.mesh[2]}"
        rows.append((run.target, run.config, mesh, *cells, run.chip.memory_gib, verdict(run)))
    note = (
        "GiB: the largest program of a phase and all that waits beside it; in brackets the estimate over it."
    )
    return (*headers, "verdict"), rows, note


def verdict(run: Run) -> str:
    """Whether the run can be, or why not."""
    if not run.rows:
        return f"has not the memory: at least {run.estimate_gib:.1f} GiB a device by estimate"
    failed = [row for row in run.rows if row["problem"]]
    return "; ".join(f"{row['program']}: {row['problem']}" for row in failed) or "compiles and fits"


def learner_table(runs: Sequence[Run]) -> tuple[Sequence[str], list[Sequence[Any]], str]:
    """Headers, a row for each program of the learner's forward passes, and a note."""
    headers = ("target", "config", "program", "ms", "products, ms", "ratio", "kernels, ms", "GB", "GB, ms")
    note = (
        "ms: the compiler's estimate for a microbatch without collectives and Pallas kernels. Products, "
        "kernels: matrix products, and those of attention in a row that is one sequence, at the peak. GB: "
        "results of collectives on a device, the loop over microbatches counted once; ms at the links' rate."
    )
    return headers, [cells for run in runs for cells in _learner_rows(run)], note


def _learner_rows(run: Run) -> Iterator[Sequence[Any]]:
    for row in run.rows:
        at_peak = products_ms(run, row)
        if at_peak is None or not row["compiled"]:
            continue
        products, kernels = at_peak
        ratio = None if row["milliseconds"] is None else row["milliseconds"] / products
        linked = 1e12 * row["collective_gb"] / run.chip.links if run.chip.links else None
        figures = (row["milliseconds"], products, ratio, kernels, row["collective_gb"], linked)
        yield (run.target, run.config, row["program"], *figures)


def _compiled(config: str, target: str, changes: Sequence[str], layers: int | None) -> Run:
    """The run on its mesh; without rows where by estimate no mesh comes near the memory."""
    settings = settings_of(config)
    model = model_of(settings)
    grid, needed = choose(settings, model, target)
    run = Run(config, target, (grid.data, grid.fsdp, grid.tensor), needed, [])
    if needed > 1.12 * (run.chip.memory_gib or 0):
        return run
    model = dataclasses.replace(model, num_layers=layers or model.num_layers)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        raw = hf_format.config_to_json(model, model.dtype)
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        words = [f"--config={ROOT}/configs/{config}.py", f"--target={target}", f"--json={folder}/rows.json"]
        words += [f"--config.model.path={folder}", f"--config.rollout.slots={SLOTS}"]
        words += [f"--config.mesh.{axis}={size}" for axis, size in dataclasses.asdict(grid).items()]
        words += [f"--config.{change}" for change in changes]
        command = [sys.executable, "-m", "ngrpo_jax.train", "--preflight", *words]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        return run._replace(rows=json.loads((folder / "rows.json").read_text(encoding="utf-8")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--configs", type=names, default=CONFIGS, help="files of configs/")
    parser.add_argument("--targets", type=names, default=TARGETS, help="as --target takes them")
    parser.add_argument("--set", action="append", default=[], help="a setting, such as train.remat=dots")
    parser.add_argument("--layers", type=int, help="layers of the models; only to see that all compiles")
    parser.add_argument("--json", metavar="FILE", help="where the runs are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
