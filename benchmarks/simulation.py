"""Rollouts on accelerators that are not here: the engine and its scheduler over simulated decode steps.

    python benchmarks/simulation.py [--seeds=3] [--json=FILE]

Compiled programs alone are replaced: queue, insertions, cache sizes, halving and lookahead are the engine's.
A decode step takes (weights + keys and values that are read) / (0.75 of the peak bandwidth), a fixed time,
and a little for each slot. With these constants the steps measured on an H100 come out within 3 %; those of
TPUs are assumed. Prefill and insertions take no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measure, shapes
from ngrpo_jax.algo.mixture import Mixture
from ngrpo_jax.model import ring_attention
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import parameter_count
from ngrpo_jax.model.inference import InferenceModel
from ngrpo_jax.preflight import memory, slots
from ngrpo_jax.rollout import engine, programs
from ngrpo_jax.rollout.decode import ChunkOutput
from ngrpo_jax.rollout.request import RolloutRequest, SamplingParams, Sequences
from ngrpo_jax.rollout.slots import Insertions
from ngrpo_jax.runtime.hardware import CHIPS
from ngrpo_jax.settings import MeshSettings, RolloutSettings, Settings

PROMPTS, SAMPLES, PROMPT, LONGEST, CHUNK = 64, 4, 256, 8192, 32
PROMPT_LIMIT = 4096
MEDIAN, P95 = 3000, 9000  # of the lengths of responses: log-normal, cut off at LONGEST
SHARE = 0.75  # of the peak bandwidth


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of a kind, and what a decode step takes besides reading: seconds, and seconds for each slot."""

    name: str
    kind: str  # of runtime.hardware.CHIPS
    platform: str
    devices: int
    fixed_s: float
    slot_s: float


MACHINES = (
    Machine("8 × v5e", "TPU v5e", "tpu", 8, 0.55e-3, 4e-6),
    Machine("8 × v6e", "TPU v6e", "tpu", 8, 0.45e-3, 2e-6),
    Machine("1 × H100", "NVIDIA H100", "gpu", 1, 0.8e-3, 4e-6),
)


@dataclasses.dataclass(frozen=True)
class Design:
    """Slots, tokens of a prompt that rows have room for, whether slots are halved, and what a step reads."""

    slots: int
    prompt_tokens: int
    halved: bool = True
    held: bool = False  # blocks that rows hold; else whole rows


class SimulatedSlots:
    """What the engine asks of slots: their number and columns; and how long each sequence is and will be."""

    def __init__(self, columns: int, held_B: np.ndarray, left_B: np.ndarray) -> None:
        self.cache = SimpleNamespace(columns=columns)
        self.held_B, self.left_B = held_B, left_B

    @property
    def active_B(self) -> np.ndarray:
        """bool [B]: slots whose sequence is unfinished."""
        return self.left_B > 0


class Device:
    """Stands in for slots.py and decode.py; counts the seconds that decode steps would take."""

    def __init__(self, config: ModelConfig, machine: Machine, design: Design) -> None:
        size = {"float32": 4, "bfloat16": 2}[config.dtype]
        self._machine, self._design = machine, design
        looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
        self._weights = (parameter_count(config) - looked_up) * size
        self._token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
        self._head_dim = config.head_dim
        self._bandwidth = SHARE * (CHIPS[machine.kind].bandwidth or math.nan)
        self.seconds = 0.0

    def empty(self, columns: int, *, count: int, **_: Any) -> SimulatedSlots:
        """Slots without a sequence."""
        return SimulatedSlots(columns, np.zeros(count, int), np.zeros(count, int))

    def insert(self, slots: SimulatedSlots, prefix: Any, insertions: Insertions, **_: Any) -> SimulatedSlots:
        """New sequences, each as long as its limit."""
        width = len(slots.held_B) // len(insertions.count)
        for shard, count in enumerate(insertions.count):
            new = slice(shard * width, shard * width + count)
            at = shard * width + insertions.slot_I[new]
            slots.held_B[at] = prefix.lengths_P[insertions.row_I[new]]
            slots.left_B[at] = insertions.limits_I[new]
        return slots

    def resize(self, slots: SimulatedSlots, columns: int) -> SimulatedSlots:
        """The slots with another cache."""
        return SimulatedSlots(columns, slots.held_B, slots.left_B)

    def keep(self, slots: SimulatedSlots, rows_B: np.ndarray, sharding: Any) -> SimulatedSlots:
        """Fewer slots: of each shard those in `rows_B`."""
        rows = rows_B.reshape(sharding.shards, -1)

        def kept(values_B: np.ndarray) -> np.ndarray:
            return np.take_along_axis(values_B.reshape(len(rows), -1), rows, axis=1).reshape(-1)

        return SimulatedSlots(slots.cache.columns, kept(slots.held_B), kept(slots.left_B))

    def prefill(self, params: Any, ids_BT: np.ndarray, lengths_B: np.ndarray, **_: Any) -> SimpleNamespace:
        """Prompts that are only counted."""
        return SimpleNamespace(cache=SimpleNamespace(columns=ids_BT.shape[1]), lengths_P=lengths_B)

    def decode_chunk(
        self, params: Any, table_VC: Any, slots: SimulatedSlots, *, steps: int, sharding: Any, **_: Any
    ) -> tuple[SimulatedSlots, ChunkOutput]:
        """A chunk of zeros, and the seconds that it would take."""
        count, shards = len(slots.held_B), sharding.shards
        valid_TB = np.arange(steps)[:, None] < slots.left_B
        tokens_B = np.full(count, slots.cache.columns)
        if self._design.held:
            width = ring_attention.block_width(self._machine.platform, self._head_dim, slots.cache.columns)
            middle_B = np.where(slots.active_B, slots.held_B + steps // 2, 1)
            tokens_B = np.minimum(-(-middle_B // width) * width, slots.cache.columns)
        read = tokens_B.reshape(shards, -1).sum(axis=1).max() * self._token
        of_step = (self._weights + read) / self._bandwidth + self._machine.fixed_s
        self.seconds += steps * (of_step + self._machine.slot_s * count / shards)
        zeros = np.zeros((steps, count), np.int32)
        mixtures = Mixture(zeros[:, :, None], np.zeros((steps, count, 1), np.float32))
        none = np.zeros((steps, count), bool)
        logprobs = np.zeros((steps, count), np.float32)
        output = ChunkOutput(zeros, mixtures, none, logprobs, none, none, valid_TB)
        generated_B = valid_TB.sum(axis=0)
        after = SimulatedSlots(slots.cache.columns, slots.held_B + generated_B, slots.left_B - generated_B)
        return after, output


def speed(config: ModelConfig, machine: Machine, design: Design, seed: int) -> float:
    """Tokens a second of one rollout, the response lengths drawn with this seed."""
    request = RolloutRequest(
        dataclasses.replace(config, vocab_size=2),
        SamplingParams(1.0),
        samples=SAMPLES,
        max_new_tokens=LONGEST,
        slots=design.slots,
        chunk=CHUNK,
        max_prompt_tokens=design.prompt_tokens,
    )
    model = InferenceModel(request.config, machine.platform, "ring" if design.held else "plain")
    by_slots = programs.decode_shapes(request, machine.devices, model)
    if not design.halved:
        by_slots = {design.slots: by_slots[design.slots]}
    compiled = programs.Programs(
        request,
        model,
        by_slots,
        prefill_rows=design.slots // SAMPLES,
        prompt_lengths=programs.prompt_lengths(design.prompt_tokens),
        sharding=SimpleNamespace(shards=machine.devices),  # type: ignore[arg-type]
    )
    lengths_B = response_lengths(seed)
    keys_B2 = np.zeros((len(lengths_B), 2), np.uint32)
    sequences = Sequences([[0] * PROMPT] * PROMPTS, keys_B2, lengths_B)
    device = Device(config, machine, design)
    with mock.patch.multiple(programs, slot_state=device, decode=device):
        under_way = engine._Rollout(None, None, compiled, sequences, engine.RolloutStats())
        under_way.run(None)
    if not np.array_equal(under_way.results.lengths_B, lengths_B):
        raise RuntimeError("the engine did not write the number of tokens that was asked for")
    return lengths_B.sum() / device.seconds


def response_lengths(seed: int) -> np.ndarray:
    """int [PROMPTS × SAMPLES]."""
    spread = math.log(P95 / MEDIAN) / 1.645
    drawn = np.exp(math.log(MEDIAN) + spread * np.random.default_rng(seed).normal(size=PROMPTS * SAMPLES))
    return np.clip(np.round(drawn), 16, LONGEST).astype(int)


def most_slots(config: ModelConfig, machine: Machine) -> int:
    """The most slots for which a training fits by the estimate of memory, up to the sequences there are."""
    settings = Settings(
        rollout=RolloutSettings(prompts=PROMPTS, group=SAMPLES, max_new_tokens=LONGEST),
        mesh=MeshSettings(fsdp=machine.devices),
    )

    def needed(changed: Settings) -> int:
        return memory.peak(memory.training_estimate(changed, config, platform=machine.platform))[0]

    room = int((CHIPS[machine.kind].memory_gib or math.nan) * 2**30)
    return slots.decided(settings, needed, PROMPTS * SAMPLES, PROMPT, room).rollout.slot_count


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="draws of the response lengths (3)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go as well")
    given = parser.parse_args()
    config = shapes.SHAPES["r1-1.5b"]
    report = measure.Report("Simulated rollouts: DeepSeek-R1-Distill-Qwen-1.5B, bfloat16")
    rows: list[tuple] = []
    for machine in MACHINES:
        fitting = most_slots(config, machine)
        designs = {
            "64 slots, room for 4096 + 8192 tokens, never halved": Design(64, PROMPT_LIMIT, halved=False),
            "slots that fit, room for the longest prompt, halved": Design(fitting, PROMPT),
            "the same, a step reads what is held": Design(fitting, PROMPT, held=True),
        }
        first = None
        for name, design in designs.items():
            found = np.array([speed(config, machine, design, seed) for seed in range(given.seeds)])
            first = found if first is None else first
            row = (machine.name, name, design.slots, measure.interval(found), measure.interval(found / first))
            rows.append(row)
    report.table(
        f"{PROMPTS} prompts of {PROMPT} tokens × {SAMPLES}; lengths: median {MEDIAN}, at most {LONGEST}",
        ("", "", "slots", "tokens/s", "to the first"),
        rows,
        f"Median (range) of {given.seeds} draws of the lengths. Slots that fit beside the learner's state, "
        "by the estimate of memory. Goals: 2.2 and 2.4 on TPUs, 2.0 and 2.7 on the H100.",
    )
    report.save(given.json)


if __name__ == "__main__":
    main()
