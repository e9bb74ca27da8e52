"""Adapters against full fine-tuning, and against TRL with PEFT: seconds and peak memory.

    python benchmarks/adapters.py [--model=DIR] [--rank=16] [--step] [--peer-python=PATH] [-- LEARNER OPTIONS]

The update alone, or with --step the whole step: rollout, reference, update. 8 prompts × 4 samples, 64 prompt
and 128 response tokens, KL term on. Each side is a process of its own, whose peak memory is that of its last
measured round; the sides run in turn. --peer-python names an environment with TRL and PEFT. What follows
`--` goes to benchmarks/learner.py, such as --remat=dots.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import learner, measure, updating
from benchmarks.peer import Peer

FULL, ADAPTERS, PEER = "all weights", "adapters", "TRL with PEFT"
GIB = 2**30


def main() -> None:
    """Measures all sides and prints one table."""
    given, options = _arguments()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sides = {FULL: options, ADAPTERS: [*options, f"--lora={given.rank}"]}
        peers: dict[str, Peer] = {}
        for name, arguments in sides.items():
            peers[name] = stack.enter_context(Peer(sys.executable, "own_learner.py"))
            peers[name].ask("load", arguments=arguments)
        if given.peer_python:
            peers[PEER] = stack.enter_context(Peer(given.peer_python, "trl_grpo.py"))
            peers[PEER].ask("load", **_load_request(folder, options, given))
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in peers}

        def side(name: str) -> Callable[[], float]:
            def run() -> float:
                answer = peers[name].ask("step", generate=given.step)
                answers[name].append(answer)
                return answer["seconds" if given.step else "update"]

            return run

        pids = [peer.pid for peer in peers.values()]
        runs = {name: side(name) for name in peers}
        timings = measure.alternate(runs, given.rounds, warmups=given.warmups, rest_s=0.3, pids=pids)
    _report(given, timings, {name: answers[name][-1]["peak_rss"] for name in peers})


def _report(given: argparse.Namespace, timings: measure.Timings, peaks: dict[str, float]) -> None:
    report = measure.Report(f"Adapters of rank {given.rank}: {given.model or 'small Qwen2'}")
    rows = [
        (
            name,
            timings.each(name),
            None if name == ADAPTERS else timings.ratio(ADAPTERS, name),
            peak / GIB,
            None if name == ADAPTERS else peaks[ADAPTERS] / peak,
        )
        for name, peak in peaks.items()
    ]
    report.table(
        "Whole step" if given.step else "Update alone",
        ("", "seconds", "time, adapters / it", "peak memory, GiB", "memory, adapters / it"),
        rows,
        timings.note() + ".",
    )
    report.save(given.json)


def _load_request(folder: str, options: list[str], given: argparse.Namespace) -> dict[str, Any]:
    own = learner.arguments(options)
    config, _, directory = learner.load_model(own, folder, for_peer=True)
    return dict(
        model=str(pathlib.Path(directory).resolve()),
        threads=os.cpu_count(),
        prompts=learner.prompts(config, own.prompts),
        samples=learner.SAMPLES,
        new_tokens=learner.NEW,
        kl_coef=learner.OBJECTIVE.kl_coef,
        learning_rate=updating.OPTIMIZER.learning_rate,
        recompute=not own.peer_keeps,
        lora=given.rank,
    )


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    """Own arguments, and those of benchmarks/learner.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a Hugging Face directory; else random weights of a small Qwen2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--step", action="store_true", help="the whole step rather than the update alone")
    parser.add_argument("--peer-python", help="the python of an environment with TRL and PEFT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--json", help="a file for all figures")
    parser.add_argument("learner", nargs="*", help="after --: options of benchmarks/learner.py")
    given = parser.parse_args()
    return given, [*([f"--model={given.model}"] if given.model else []), *given.learner]


if __name__ == "__main__":
    main()
