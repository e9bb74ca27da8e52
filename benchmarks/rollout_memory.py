"""The memory of a long rollout: by calculation, by XLA's account of it, and as the kernel counted it.

Run as a program it is the measuring child of `benchmarks/rollout.py --memory`: a process of its own, so that
nothing that came before is counted. It answers one request on stdin, as benchmarks/peer.py sends it.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from benchmarks import chunks, measure, shapes
from benchmarks.peer import Peer
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import memory
from ngrpo_jax.rollout import engine
from ngrpo_jax.rollout.programs import compile_ahead
from ngrpo_jax.rollout.request import RolloutRequest, SamplingParams
from ngrpo_jax.runtime.console import format_bytes

# Narrow but for what the case is about: a vocabulary of 152k and a cache of 4 KiB a token.
NARROW = ModelConfig("qwen2", 151936, 128, 256, 2, 4, 4, 64, tie_embeddings=True)
PROMPT, CHUNK = 64, 16
GOAL = 0.15


def report_memory(report: measure.Report, *, slots: int, tokens: int) -> None:
    """Adds the table: a rollout of `tokens` new tokens in every slot."""
    predicted = _predicted(slots, tokens)
    measure.say(f"memory: a rollout of {slots} × {tokens} tokens in a process of its own")
    with Peer(sys.executable, pathlib.Path(__file__).resolve()) as child:
        answer = child.ask("measure", slots=slots, tokens=tokens)
    rows = [("calculation (preflight/memory.py)", format_bytes(predicted), None)]
    for name, size in (
        ("measured: most memory of the process", answer["peak"]),
        ("XLA's account of a chunk", answer["chunk"]),
    ):
        rows.append((name, format_bytes(size), predicted / size))
    report.table(
        f"Memory: {slots} slots, prompt {PROMPT}, {tokens} new tokens, vocabulary {NARROW.vocab_size}",
        ("", "bytes", "calculation / this"),
        rows,
        f"Parameters, cache, prefill and logits of a narrow model. Goal: within {GOAL:.0%} of the measured.",
    )


def _predicted(slots: int, tokens: int) -> int:
    """What preflight says that a rollout holds: its copy of the parameters and everything of its phase."""
    sizes = memory.RolloutSizes(slots, slots, PROMPT, PROMPT + tokens)
    return memory.held(memory.rollout_estimate(NARROW, sizes), "rollout")


def measured(slots: int, tokens: int) -> dict[str, int]:
    """Bytes at the worst moment of a real rollout, over what the process needs without its arrays.

    All its programs are compiled and have run before, and what that left behind is not counted.
    """
    measure.return_freed_memory()
    params = shapes.random_params(NARROW)
    prompts = np.random.default_rng(0).integers(NARROW.vocab_size, size=(slots, PROMPT)).tolist()

    options: dict[str, Any] = dict(
        samples=1,
        max_new_tokens=tokens,
        temperature=1.0,
        stop_ids=(),
        slots=slots,
        chunk=CHUNK,
        max_prompt_tokens=PROMPT,
    )
    chunk = chunks.decoding_memory(params, NARROW, slots=slots, context=PROMPT + tokens, steps=CHUNK)
    compile_ahead(params, RolloutRequest(NARROW, SamplingParams(1.0), 1, tokens, slots, CHUNK, PROMPT))
    engine.generate(params, NARROW, prompts, lengths_B=np.ones(slots, np.int32), **options)
    gc.collect()
    arrays, before = sum(array.nbytes for array in jax.live_arrays()), measure.current_rss()
    measure.reset_peak_rss()
    engine.generate(params, NARROW, prompts, **options)
    return {"peak": measure.peak_rss() - before + arrays, "chunk": chunk}


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    request = json.loads(sys.stdin.readline())
    print(json.dumps(measured(request["slots"], request["tokens"])), flush=True)
