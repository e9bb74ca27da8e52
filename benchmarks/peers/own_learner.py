"""This project's learner as a peer, so that each of several has memory of its own: JSON lines in and out.

    {"op": "load", "arguments": ["--model=DIRECTORY", ...]}    as benchmarks/learner.py takes them
    {"op": "step", "generate": true}

Answers as peers/trl_grpo.py: seconds of a step and its phases, and the most memory since the load.
"""

import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import learner, measure


def main() -> None:
    """Answers until stdin ends. What libraries print goes to stderr: stdout is for answers alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    given = learner.arguments(json.loads(sys.stdin.readline())["arguments"])
    with tempfile.TemporaryDirectory() as folder:
        ours = learner.Ours(*learner.load_model(given, folder)[:2], given)
    measure.return_freed_memory()
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        measure.reset_peak_rss()
        seconds = ours.step() if json.loads(line)["generate"] else ours.update()
        phases = {name: taken[-1] if taken else 0.0 for name, taken in ours.phases.items()}
        print(
            json.dumps({"seconds": seconds, **phases, "peak_rss": measure.peak_rss()}),
            file=answers,
            flush=True,
        )


if __name__ == "__main__":
    main()
