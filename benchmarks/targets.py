"""What the compilers say of a run on machines that are not here: memory, collectives, estimated time.

    python benchmarks/targets.py --model=DIR [--config=ngrpo_1_5b] [--set=NAME=VALUE ...] TARGET ...

DIR holds the model's config.json; no weights are read. TARGET is as `train --preflight --target` takes it;
the extras aot-tpu and aot-cuda12 install the compilers. Each TARGET has a process of its own, with mesh.fsdp
the number of its devices. A TPU slice takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measure, shapes
from ngrpo_jax import flags
from ngrpo_jax.model import hf
from ngrpo_jax.runtime.hardware import CHIPS
from ngrpo_jax.settings import resolve

ROOT = pathlib.Path(__file__).parent.parent
KINDS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "h100": "NVIDIA H100"}
# Forward passes over the layers, and over the head, whose products a program needs: full remat adds one.
PASSES = {"accumulate": (4, 3), "score": (1, 1)}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", default="ngrpo_1_5b")
    parser.add_argument("--set", action="append", default=[], help="a setting, such as train.remat=dots")
    given = parser.parse_args()
    report, rows = measure.Report("Targets"), []
    for target in given.targets:
        for row in _rows(given, target):
            at_peak = _products_ms(given, target, row["program"])
            ratio = row["milliseconds"] / at_peak if at_peak and row["milliseconds"] else None
            links = CHIPS[KINDS[target.partition(":")[0]]].links
            linked = row["collective_gb"] and 1e12 * row["collective_gb"] / links
            cells = [row[name] for name in ("program", "seconds", "total_gib", "device_gib", "milliseconds")]
            rows.append((target, *cells, at_peak, ratio, row["collective_gb"], linked, row["problem"]))
    report.table(
        f"{given.config}, {pathlib.Path(given.model).name}",
        ("target", "program", "compiled in s", "GiB", "of", "ms", "products ms", "ratio", "GB", "GB, ms", ""),
        rows,
        "GiB: arguments, results, temporaries, what waits on a device. ms: the compiler's estimate without "
        "collectives and Pallas kernels. Products: a microbatch's matrix products, but attention's, at the "
        "peak. GB: results of collectives on a device, the loop over microbatches counted once; ms at the "
        "rate of the links.",
    )


def _rows(given: argparse.Namespace, target: str) -> list[dict[str, Any]]:
    """The rows of `train --preflight --target`."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "rows.json"
        words = [f"--config={ROOT}/configs/{given.config}.py", f"--target={target}", f"--json={out}"]
        words += [f"--config.model.path={given.model}", f"--config.mesh.fsdp={_devices(target)}"]
        words += [f"--config.{word}" for word in given.set]
        command = [sys.executable, "-m", "ngrpo_jax.train", "--preflight", *words]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        return json.loads(out.read_text())


def _devices(target: str) -> int:
    return math.prod(map(int, target.partition(":")[2].split("x")))


def _products_ms(given: argparse.Namespace, target: str, program: str) -> float | None:
    """Milliseconds that a microbatch's matrix products take at the peak; None for programs of the rollout."""
    passes = PASSES.get(program.partition(" ")[0])
    if passes is None:
        return None
    settings = resolve(flags.load_config(str(ROOT / "configs" / f"{given.config}.py")))
    model = hf.read_config(given.model)
    head = model.vocab_size * model.hidden_size
    layers = shapes.matrix_parameters(model) - head
    tokens = settings.train.rows_per_device * settings.row_tokens
    work = 2 * tokens * (passes[0] * layers + passes[1] * head)
    return 1e3 * work / CHIPS[KINDS[target.partition(":")[0]]].flops


if __name__ == "__main__":
    main()
