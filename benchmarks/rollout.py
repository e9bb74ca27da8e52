"""Decoding: what mixing costs, and how far a step is from its matrix products alone.

    python benchmarks/rollout.py [--shape=small|smollm2] [--slots=32] [--context=192] [--pairs=40]

Random weights in a model's shape, all slots busy. Chunks with mixing on and off alternate in one process; the
ratio printed is the median over pairs with the interval of its middle 90 %. The bound is the same number of
steps of the step's matrix products and nothing else. Needs no data and no network.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import decode, engine
from ngrpo_jax.runtime import console

SHAPES = {
    "small": ModelConfig("qwen2", 4096, 256, 1024, 4, 4, 2, 64, tie_embeddings=True),
    "smollm2": ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, tie_embeddings=True),
}
STEPS = 8


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--context", type=int, default=192, help="length of every cache")
    parser.add_argument("--pairs", type=int, default=40, help="alternating measurements")
    parser.add_argument("--rate", type=float, default=0.1)
    given = parser.parse_args()
    config = SHAPES[given.shape]
    params = engine.lay_out(decoder.init(jax.random.key(0), config), config)
    start = time.perf_counter()
    table_VC = jax.block_until_ready(neighbor_table(params["embed"]["embedding"], 3))
    table_s = time.perf_counter() - start
    off = _chunk(params, config, None, Mixing(strategy="none"), given)
    on = _chunk(params, config, table_VC, Mixing(rate=given.rate, k=3), given)
    bound = _products(params, config, given.slots)
    for run in (off, on, bound):
        run()  # compiles
    seconds = np.array([[run() for run in (off, on, bound)] for _ in range(given.pairs)])
    tokens = STEPS * given.slots
    medians = np.median(seconds, axis=0)
    rows = [
        (name, tokens / s, s / medians[0], medians[2] / s)
        for name, s in zip(
            ("mixing off", f"mixing on, rate {given.rate}", "matrix products alone"), medians, strict=True
        )
    ]
    print(f"{given.shape}: {given.slots} slots, context {given.context}, {config.dtype}, {_machine()}")
    print(console.table(rows, ("", "tokens/s", "time / mixing off", "share of the bound")))
    low, middle, high = np.quantile(seconds[:, 1] / seconds[:, 0], (0.05, 0.5, 0.95))
    print(
        f"on / off, {given.pairs} alternating pairs: median {middle:.4f}, 90 % within {low:.4f} … {high:.4f}"
    )
    print(f"neighbour table, once: {console.format_seconds(table_s)} (compilation included)")


def _chunk(params, config, table_VC, mixing, given):
    """A function that decodes one chunk from a fresh state and returns its seconds."""
    sampler = decode.Sampler(1.0, 1.0, 0, mixing, (), 10**6)
    prompt = np.ones((1, given.context - STEPS), np.int32)
    prefix = decode.prefill(params, prompt, np.array([prompt.shape[1]], np.int32), config=config)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), given.slots)))
    sources, enters = np.zeros(given.slots, np.int32), np.ones(given.slots, bool)

    def run() -> float:
        slots = decode.empty_slots(config, sampler, given.slots, given.context)
        slots = jax.block_until_ready(decode.fill(slots, *prefix, sources, enters, keys))
        start = time.perf_counter()
        jax.block_until_ready(
            decode.decode_chunk(params, table_VC, slots, config=config, sampler=sampler, steps=STEPS)
        )
        return time.perf_counter() - start

    return run


def _products(params, config, slots):
    """A function that runs the weight products of STEPS steps and returns their seconds."""
    kernels = [
        leaf.reshape(config.num_heads * config.head_dim, -1)
        if "'o'" in name
        else leaf.reshape(leaf.shape[0], -1)
        for name, leaf in _named(params["layers"])
        if "kernel" in name
    ]
    kernels.append(decoder.head(params, config))

    @jax.jit
    def products(x_BW, kernels):
        def step(x_BW, _):
            total = 0.0
            for kernel in kernels:
                total += jnp.sum(x_BW[:, : kernel.shape[0]] @ kernel)
            return x_BW + 1e-20 * total, None

        return jax.lax.scan(step, x_BW, None, length=STEPS)[0]

    x_BW = jnp.ones((slots, max(kernel.shape[0] for kernel in kernels)), config.dtype)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(products(x_BW, kernels))
        return time.perf_counter() - start

    return run


def _named(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _machine() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} × {jax.device_count()}, jax {jax.__version__}, {platform.machine()}"


if __name__ == "__main__":
    main()
