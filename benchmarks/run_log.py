"""What a step's log costs: seconds to write the rows of a finished run again, against the time of its steps.

    python benchmarks/run_log.py WORKDIR

The rows of metrics.jsonl and samples.jsonl, two groups a step, go to a new folder by the run's own writer,
with TensorBoard. Medians. Choosing the groups and decoding their text is not in it.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from ngrpo_jax.runtime.metrics import RunLog, read_rows


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    workdir = parser.parse_args().workdir
    rows, samples = read_rows(workdir / "metrics.jsonl"), collections.defaultdict(list)
    text = (workdir / "samples.jsonl").read_text(encoding="utf-8")
    for sample in map(json.loads, text.splitlines()):
        samples[sample["step"]].append(sample)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        with RunLog(folder, loggers=["tensorboard"]) as log:
            for row in rows:
                begun = time.monotonic()
                metrics = {name: value for name, value in row.items() if name != "step" and value is not None}
                log.write(row["step"], metrics, samples[row["step"]])
                seconds.append(time.monotonic() - begun)
        size = sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())
    written, step = statistics.median(seconds), statistics.median(row["time/step"] for row in rows)
    print(
        f"log {1000 * written:.2f} ms a step, step {step:.2f} s: {100 * written / step:.2f} %; "
        f"{size / len(rows) / 1000:.1f} kB a step"
    )


if __name__ == "__main__":
    main()
