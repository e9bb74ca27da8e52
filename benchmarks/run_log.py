"""What a run's log costs: seconds to write it against the time of its steps, its size, and the page of it.

    python benchmarks/run_log.py WORKDIR [--steps=1000] [--step-bytes=N]

The rows of metrics.jsonl and samples.jsonl of a finished run, two groups a step, are written again by the
run's own writer, with TensorBoard, over and over until there are as many steps as asked for. Then `report`
draws its page of them in a process of its own. --step-bytes lengthens each response until a step's have so
many bytes: 160000 is the most that a run keeps. Medians. Choosing the groups and decoding their text is not
in it.
"""

import argparse
import collections
import json
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from ngrpo_jax.runtime.metrics import RunLog, read_rows

BESIDE = ("config.json", "summary.json", "evaluations.jsonl")  # what else the page is made of
MB = 1e6


def main() -> None:
    """Prints two lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--step-bytes", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = write(given.workdir, pathlib.Path(folder), given.steps, given.step_bytes)
        step = statistics.median(row["time/step"] for row in read_rows(given.workdir / "metrics.jsonl"))
        size = sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())
        print(
            f"log: {1000 * written:.2f} ms a step of {step:.2f} s, {100 * written / step:.2f} %; "
            f"{given.steps} steps {size / MB:.1f} MB"
        )
        for name in BESIDE:
            shutil.copy(given.workdir / name, folder)
        begun = time.monotonic()
        words = [sys.executable, "-m", "ngrpo_jax.report", f"--workdir={folder}"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - begun
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        page = (pathlib.Path(folder) / "report.html").stat().st_size
        print(f"page: {seconds:.1f} s, {peak / MB:.0f} MB of memory, {page / MB:.2f} MB of file")


def write(workdir: pathlib.Path, folder: pathlib.Path, steps: int, step_bytes: int) -> float:
    """Writes the log of so many steps to `folder`, with `step_bytes` of responses; seconds a step."""
    rows, samples = read_rows(workdir / "metrics.jsonl"), collections.defaultdict(list)
    for sample in map(json.loads, (workdir / "samples.jsonl").read_text(encoding="utf-8").splitlines()):
        samples[sample["step"]].append(sample)
    seconds: list[float] = []
    with RunLog(folder, loggers=["tensorboard"]) as log:
        for step in range(1, steps + 1):
            row = rows[(step - 1) % len(rows)]
            metrics = {name: value for name, value in row.items() if name != "step" and value is not None}
            found = samples[row["step"]]
            longer = max(1, step_bytes // sum(len(sample["response"]) for sample in found))
            of_step = [sample | {"step": step, "response": sample["response"] * longer} for sample in found]
            begun = time.monotonic()
            log.write(step, metrics, of_step)
            seconds.append(time.monotonic() - begun)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
