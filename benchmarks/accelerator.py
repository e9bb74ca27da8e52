"""What this project reaches on a GPU or TPU, and what share of the machine's own bounds that is.

    python benchmarks/accelerator.py [--shape=r1-1.5b] [--json=FILE]

Random bfloat16 weights in the shape of DeepSeek-R1-Distill-Qwen-1.5B (or 7B), made on the device: no
download, no checkpoint, no tokenizer. Needs jax, flax, optax and chex alone, of the project algo, model,
rollout and learner. --shape=small tries the program on a CPU. Cases: --update --decode --prefill --table
--mixing; all of them where none is named. What does not fit the device's memory is left out, and said.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import bounds, chunks, measure, mixing, shapes, updating
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import parameter_count

CASES = ("update", "decode", "prefill", "table", "mixing")
K = 3
_SPARE = 0.9  # of the memory that the device gives: the rest is scratch that no formula here counts


class Sizes(NamedTuple):
    """What is measured with a shape."""

    slots: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int  # of a decode chunk
    rounds: int
    pairs: int  # chunks with mixing and without
    prefills: tuple[tuple[int, int], ...]  # rows, tokens
    update: tuple[int, int]  # packed rows of a microbatch, their tokens
    copy: int  # bytes that a copy moves to show the memory's bandwidth
    product: int  # rows and columns of a large matrix product


LARGE = Sizes(
    slots=(16, 64, 256),
    contexts=(1024, 4096, 9216),
    steps=16,
    rounds=5,
    pairs=200,
    prefills=((16, 256), (8, 1024), (2, 4096)),
    update=(1, 8192),
    copy=2**31,
    product=8192,
)
SMALL = Sizes((8,), (64,), 2, 2, 3, ((2, 32),), (1, 64), 2**24, 256)


class Bench(NamedTuple):
    """What every case needs."""

    report: measure.Report
    config: ModelConfig
    params: Any  # rollout layout
    sizes: Sizes
    free: int | None  # bytes of device memory beside the parameters; None: nobody tells


def main() -> None:
    """Measures the chosen cases and prints their tables."""
    given = _arguments()
    config = shapes.SHAPES[given.shape]
    sizes = SMALL if given.shape == "small" else LARGE
    report = measure.Report(f"Accelerator: {given.shape}, {config.dtype}")
    chosen = [case for case in CASES if getattr(given, case)] or CASES
    if "update" in chosen:
        # First, for a device tells its peak memory since the start; and before other parameters take any.
        updating.report_update(
            report, config, *sizes.update, rounds=sizes.rounds, memory=_memory(), product=sizes.product
        )
    if set(chosen) - {"update"}:
        rollout_cases(report, config, sizes, chosen)
    report.save(given.json)


def rollout_cases(
    report: measure.Report, config: ModelConfig, sizes: Sizes, chosen: tuple[str, ...] | list[str]
) -> None:
    """All that runs on parameters in the rollout's layout; frees them when it returns."""
    need = parameter_count(config) * jnp.dtype(config.dtype).itemsize
    memory = _memory()
    if memory is not None and need > memory:
        measure.say(f"the parameters need {need / 1e9:.1f} GB, the device has {memory / 1e9:.1f} GB")
        return
    params = jax.block_until_ready(shapes.random_params(config))
    bench = Bench(report, config, params, sizes, None if memory is None else memory - need)
    if "decode" in chosen:
        decode_rates(bench)
    if "prefill" in chosen:
        prefill_rates(bench)
    if "table" in chosen:
        table_time(bench)
    if "mixing" in chosen:
        slots, context = sizes.slots[len(sizes.slots) // 2], sizes.contexts[0]
        sized = dict(slots=slots, context=context, steps=sizes.steps, pairs=sizes.pairs)
        mixing.report_mixing(report, params, config, **sized)


def decode_rates(bench: Bench) -> None:
    """Tokens a second by slots and context, against the bytes that a step must read."""
    config, sizes = bench.config, bench.sizes
    bandwidth = bounds.copy_bandwidth(sizes.copy)
    weights = shapes.weights_read(config) * jnp.dtype(config.dtype).itemsize
    rows = []
    for slots in sizes.slots:
        for context in sizes.contexts:
            cache = slots * context * shapes.cache_bytes(config)
            if bench.free is not None and cache > _SPARE * bench.free:
                rows.append((slots, context, None, None, None))
                continue
            run = chunks.decoding(bench.params, config, slots=slots, context=context, steps=sizes.steps)
            step_s = measure.alternate({"": run}, sizes.rounds).each("").median / sizes.steps
            del run  # the cache, before the next one is made
            bound_s = (weights + cache) / bandwidth
            rows.append((slots, context, slots / step_s, 1e3 * step_s, bound_s / step_s))
    bench.report.table(
        "Decode",
        ("slots", "context", "tokens/s", "ms a step", "share of the bandwidth bound"),
        rows,
        f"The bound: every weight ({weights / 1e9:.2f} GB) and the whole cache read once a step at the "
        f"{bandwidth / 1e9:.0f} GB/s that a copy reaches here, reading and writing. A dash: does not fit.",
    )


def prefill_rates(bench: Bench) -> None:
    """Prompt tokens a second, against a large matrix product's rate."""
    config = bench.config
    rate = bounds.product_rate(*[bench.sizes.product] * 3, config.dtype)
    layers = shapes.matrix_parameters(config) - config.vocab_size * config.hidden_size  # no head: one row
    rows = []
    for count, tokens in bench.sizes.prefills:
        run = chunks.prefilling(bench.params, config, rows=count, tokens=tokens)
        seconds = measure.alternate({"": run}, bench.sizes.rounds).each("").median
        flops = count * tokens * (2 * layers + shapes.attention_flops(config, tokens))
        rows.append((count, tokens, count * tokens / seconds, flops / rate / seconds))
    bench.report.table(
        "Prefill",
        ("prompts", "tokens each", "tokens/s", "share of the product's rate"),
        rows,
        f"A product of {bench.sizes.product}³ in {config.dtype} reaches {rate / 1e12:.3g} TFLOP/s here. "
        "Attention counts as causal: half of its square.",
    )


def table_time(bench: Bench) -> None:
    """Seconds of the neighbour table, against the bare products of all pairs of rows in float32."""
    config = bench.config
    embedding_VD = bench.params["embed"]["embedding"]
    V, D = embedding_VD.shape
    rate = bounds.product_rate(min(V, bench.sizes.product), D, min(V, 4 * bench.sizes.product), "float32")
    build = lambda: measure.seconds_of(lambda: neighbor_table(embedding_VD, K))  # noqa: E731
    seconds = measure.alternate({"": build}, bench.sizes.rounds).each("")
    bench.report.table(
        "Neighbour table",
        ("rows", "width", "k", "seconds", "bare products / it"),
        [(V, config.hidden_size, K, seconds, 2 * V * V * D / rate / seconds.median)],
        f"The bare products: all {V}² scores at the {rate / 1e12:.3g} TFLOP/s that one block reaches here in "
        "full float32; a table that uses the symmetry of the scores needs half of them and may pass 1.",
    )


def _memory() -> int | None:
    """Bytes of the device; None where nobody tells (CPU)."""
    stats = jax.devices()[0].memory_stats()
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=("small", "r1-1.5b", "r1-7b"), default="r1-1.5b")
    parser.add_argument("--json", metavar="FILE", help="where the figures go as well")
    for case in CASES:
        parser.add_argument(f"--{case}", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
