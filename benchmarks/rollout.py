"""Rollouts against vLLM and Hugging Face, against the machine's bounds, and against themselves unmixed.

    python benchmarks/rollout.py [--equal] [--tail] [--mixing] [--memory] [--model=DIR]
                                 [--by-slots] [--vllm-python=PATH] [--peer-python=PATH]

Without a choice of cases: equal lengths, long tail and mixing. Without --model: random weights in the shape
of a small Qwen2. Without --vllm-python no vLLM, without --peer-python no Hugging Face `generate`. Prints
Markdown tables: medians of alternating runs. benchmarks/README.md says how to make the peers' environments
and what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import bounds, measure, mixing, rollout_memory, shapes
from benchmarks.contenders import SAMPLES, Model, Ours, Theirs, Work, agreement
from benchmarks.peer import Peer
from ngrpo_jax.model import hf, inference
from ngrpo_jax.model.config import ModelConfig

PROMPT = 64
EQUAL_PROMPTS, EQUAL_NEW = 8, 128
TAIL_PROMPTS, TAIL_MEDIAN, TAIL_95TH, TAIL_CAP = 64, 60, 400, 512
BOUND_STEPS = 64
SLOTS = (16, 32, 64, 128, 256)
OURS, DECODING, HUGGING_FACE, VLLM, PRODUCTS, READING, MATRICES = (
    "this engine",
    "this engine, decoding alone",
    "Hugging Face generate",
    "vLLM",
    "the step's weight products alone",
    "one reading of keys and values",
    "the step's matrix products alone",
)
_REST_S = 0.3  # a peer's threads spin a little after their work


def main() -> None:
    """Measures the chosen cases and prints their tables."""
    given = _arguments()
    with contextlib.ExitStack() as stack:
        model = _model(given, stack.enter_context(tempfile.TemporaryDirectory()))
        report = measure.Report(f"Rollout: {model.name}, {model.config.dtype}")
        if given.equal or given.tail:
            peers = _start_peers(stack, model, given)
            if given.equal:
                equal_lengths(report, model, peers, given)
            if given.tail:
                long_tail(report, model, peers, given)
        if given.mixing:
            sizes = dict(slots=given.slots, context=given.context, steps=given.steps, pairs=given.pairs)
            mixing.report_mixing(report, model.params, model.config, **sizes)
        if given.by_slots:
            by_slots(report, model, given)
        if given.memory:
            rollout_memory.report_memory(report, slots=given.memory_slots, tokens=given.memory_tokens)
        report.save(given.json)


def equal_lengths(
    report: measure.Report, model: Model, peers: dict[str, Peer], given: argparse.Namespace
) -> None:
    """All responses equally long, all slots busy: nothing to schedule, the speed of a step."""
    count = EQUAL_PROMPTS * SAMPLES
    work = Work(_prompts(model.config, EQUAL_PROMPTS), np.full(count, EQUAL_NEW, np.int32))
    ours = Ours(model, work, count, given.chunk)
    products = bounds.weight_products(model.config, count, BOUND_STEPS)
    # A step reads the prompt and, in the mean of the run, half of the response.
    reading = bounds.cache_reading(model.config, count, PROMPT + EQUAL_NEW // 2, BOUND_STEPS)
    sides = {OURS: ours, PRODUCTS: products.run, READING: reading}
    sides |= {name: Theirs(peer, work, count) for name, peer in peers.items()}
    agreed = [f"{name}: {agreement(model, peer, work)}" for name, peer in peers.items()]
    pids = [peer.pid for peer in peers.values()]
    timings = measure.alternate(sides, given.rounds, rest_s=_REST_S, pids=pids)
    rate = {
        OURS: work.tokens / timings.seconds[OURS],
        DECODING: work.tokens / np.array(ours.decode_s[-given.rounds :])[list(timings.kept)],
        MATRICES: count / (timings.seconds[PRODUCTS] + timings.seconds[READING]),
        PRODUCTS: count / timings.seconds[PRODUCTS],
    }
    rate |= {name: work.tokens / timings.seconds[name] for name in peers}
    step_s = timings.each(PRODUCTS).median
    report.table(
        f"Equal lengths: {EQUAL_PROMPTS} prompts × {SAMPLES}, prompt {PROMPT}, {EQUAL_NEW} new tokens",
        ("", "tokens/s", "this engine / it"),
        [(name, measure.interval(rate[name]), measure.interval(rate[OURS] / rate[name])) for name in rate],
        timings.note() + ".",
        f"Weight products: {products.flops / step_s / 1e9:.1f} GFLOP/s, {1e3 * step_s:.3g} ms a step; "
        f"{products.arrangement}, the best of: "
        + ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in products.tried.items())
        + ".",
        *agreed,
        f"Matrix products: those of the weights, and attention's two over the cache, which count as one "
        f"reading of its keys and values ({1e3 * timings.each(READING).median:.3g} ms).",
        "Goals: at least 1.0 × vLLM (small shape: 1.4 ×), at least 0.70 of the matrix products.",
    )


def long_tail(
    report: measure.Report, model: Model, peers: dict[str, Peer], given: argparse.Namespace
) -> None:
    """Response lengths with a long tail, forced on every engine: the speed of the scheduler."""
    count = TAIL_PROMPTS * SAMPLES
    work = Work(_prompts(model.config, TAIL_PROMPTS), tail_lengths(count))
    ours = Ours(model, work, given.slots, given.chunk)
    sides = {OURS: ours} | {name: Theirs(peer, work, given.slots) for name, peer in peers.items()}
    pids = [peer.pid for peer in peers.values()]
    timings = measure.alternate(
        sides, given.tail_rounds, warmups=given.tail_warmups, rest_s=_REST_S, pids=pids
    )
    stats, perfect = ours.stats, perfect_steps(work.lengths_B, given.slots)
    rows = [_tail_row(OURS, work, timings, stats.occupancy, stats.steps)]
    for name in peers:
        steps = sides[name].steps
        occupancy = None if steps is None else work.tokens / (steps * given.slots)
        rows.append(_tail_row(name, work, timings, occupancy, steps))
    rows.append(("a perfect scheduler", None, None, work.tokens / (perfect * given.slots), perfect))
    share = perfect * given.slots / stats.rows
    report.table(
        f"Long tail: {TAIL_PROMPTS} prompts × {SAMPLES}, prompt {PROMPT}, {given.slots} slots",
        ("", "tokens/s", "this engine / it", "occupancy", "decode steps"),
        rows,
        f"{work.tokens} tokens: response lengths log-normal, median {np.median(work.lengths_B):.0f}, "
        f"95th percentile {np.quantile(work.lengths_B, 0.95):.0f}, cap {TAIL_CAP}. {timings.note()}.",
        f"Occupancy while sequences wait: {stats.queued_occupancy:.3f} (goal 0.88). Rows of a perfect "
        f"scheduler that never halves its slots (chunk 1, same order), over ours: {share:.3f} (goal 0.95). "
        "vLLM: goal 1.0 (small shape: 1.2).",
    )


def by_slots(report: measure.Report, model: Model, given: argparse.Namespace) -> None:
    """The long tail by number of slots: what `rollout.slots` should be where memory sets no bound."""
    work = Work(_prompts(model.config, TAIL_PROMPTS), tail_lengths(TAIL_PROMPTS * SAMPLES))
    sides = {str(count): Ours(model, work, count, given.chunk) for count in SLOTS}
    timings = measure.alternate(sides, given.tail_rounds, warmups=given.tail_warmups)
    report.table(
        f"Slots: long tail, {TAIL_PROMPTS} prompts × {SAMPLES}, prompt {PROMPT}",
        ("slots", "tokens/s", f"time / {SLOTS[-1]} slots"),
        [
            (name, measure.interval(work.tokens / timings.seconds[name]), timings.ratio(name, str(SLOTS[-1])))
            for name in sides
        ],
        timings.note() + ".",
    )


def tail_lengths(count: int, seed: int = 0) -> np.ndarray:
    """int32 [count]: log-normal with the median and the 95th percentile of TAIL_*, from 1 to the cap."""
    sigma = math.log(TAIL_95TH / TAIL_MEDIAN) / 1.6448536  # the 95th percentile of a standard normal
    drawn = np.exp(math.log(TAIL_MEDIAN) + sigma * np.random.default_rng(seed).standard_normal(count))
    return np.clip(np.rint(drawn), 1, TAIL_CAP).astype(np.int32)


def perfect_steps(lengths: Sequence[int] | np.ndarray, slots: int) -> int:
    """Decode steps of a scheduler that wastes none: in order, each sequence takes the slot free first."""
    free_at = [0] * slots
    for length in lengths:
        heapq.heappush(free_at, heapq.heappop(free_at) + int(length))
    return max(free_at)


def _tail_row(
    name: str, work: Work, timings: measure.Timings, occupancy: float | None, steps: int | None
) -> tuple:
    rate = measure.interval(work.tokens / timings.seconds[name])
    return name, rate, timings.ratio(name, OURS), occupancy, steps


def _prompts(config: ModelConfig, count: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(config.vocab_size, size=(count, PROMPT)).tolist()


def _model(given: argparse.Namespace, scratch: str) -> Model:
    """The directory that was named, or random weights, written where a peer can read them."""
    if given.model is not None:
        config, params = hf.load(given.model)
        name = os.path.basename(os.path.normpath(given.model))
        return Model(config, inference.to_inference_layout(params, config), given.model, name)
    config = shapes.SHAPES["small"]
    params = shapes.random_params(config, stacked=True)
    directory = os.path.join(scratch, "small")
    hf.save(directory, config, params)
    return Model(
        config, inference.to_inference_layout(params, config), directory, "small Qwen2, random weights"
    )


def _start_peers(stack: contextlib.ExitStack, model: Model, given: argparse.Namespace) -> dict[str, Peer]:
    """The peers whose interpreters were named, with the model loaded."""
    of_vllm = {"slots": max(given.slots, EQUAL_PROMPTS * SAMPLES), "tokens": PROMPT + TAIL_CAP}
    chosen = {
        VLLM: (given.vllm_python, "vllm_generate.py", of_vllm),
        HUGGING_FACE: (given.peer_python, "hf_generate.py", {}),
    }
    peers = {}
    for name, (python, script, sizes) in chosen.items():
        if python is None:
            continue
        peers[name] = stack.enter_context(Peer(python, script))
        directory = os.path.abspath(model.directory)
        loaded = peers[name].ask("load", model=directory, threads=given.peer_threads, **sizes)
        measure.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in loaded.items()))
    return peers


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for case, what in (
        ("equal", "32 responses of 128 tokens each"),
        ("tail", "256 responses with a long tail"),
        ("by-slots", "the same responses with 16 to 256 slots"),
        ("mixing", "what mixing costs a decode step"),
        ("memory", "a long rollout's memory, calculated and measured (minutes)"),
    ):
        parser.add_argument(f"--{case}", action="store_true", help=what)
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face directory")
    parser.add_argument("--vllm-python", metavar="PATH", help="the python that has vLLM for CPU")
    parser.add_argument("--peer-python", metavar="PATH", help="the python that has torch and transformers")
    parser.add_argument("--peer-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", metavar="FILE", help="where the figures go as well")
    for name, default, what in (
        ("rounds", 3, "of --equal: runs of each side"),
        ("tail-rounds", 2, "of --tail: runs of each side"),
        ("tail-warmups", 1, "of --tail: runs of each side that do not count"),
        ("slots", 32, "sequences side by side, of --tail and --mixing; the batch of the peers"),
        ("chunk", 16, "decode steps between two refills"),
        ("pairs", 200, "of --mixing: chunks of each side"),
        ("steps", 4, "of --mixing: decode steps of a chunk"),
        ("context", 192, "of --mixing: tokens in every slot's cache"),
        ("memory-slots", 8, "of --memory: sequences side by side"),
        ("memory-tokens", 8192, "of --memory: new tokens in each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    given = parser.parse_args()
    if not (given.equal or given.tail or given.mixing or given.memory or given.by_slots):
        given.equal = given.tail = given.mixing = True
    return given


if __name__ == "__main__":
    main()
