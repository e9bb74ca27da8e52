"""How much memory one device needs in a run, estimated from settings and model sizes.

Owns the estimate: a list of allocations, each with the phase in which it is held. Makes no array and looks
at no device. Must not know how much memory a device has (capacity.py), nor refuse anything (fit.py).

The estimate counts the arrays that grow with a setting. benchmarks/memory.py compares it with what the kernel
counts on a CPU: it is within 15 %. That is enough to find the setting that makes a run too large, but a run
that fits by a narrow margin may fail.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, get_args

from ngrpo_jax.algo.neighbors import tiles
from ngrpo_jax.algo.neighbors.exact import TILE
from ngrpo_jax.model import cached_attention
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import parameter_count, trained_count
from ngrpo_jax.runtime.console import format_bytes
from ngrpo_jax.settings import Settings

_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_F32 = 4
_MORE_FSDP = "raise mesh.fsdp"
# Of each row while a neighbour table is made (algo/neighbors/tiles.py), each 2 x 4 bytes.
_TILE_MEMORIES = TILE // 4
# float32 master parameters and the two moments of Adam: what is held, and what a checkpoint writes.
_STATE_BYTES = 3 * _F32

# When an allocation is held. The last three follow one another in a step, so that no two are held together.
Phase = Literal["always", "table", "rollout", "update"]


class Allocation(NamedTuple):
    """One share of a device's memory: what it is, bytes, when it is held, and what makes it smaller."""

    name: str
    size: int
    phase: Phase
    remedy: str


@dataclasses.dataclass(frozen=True)
class RolloutSizes:
    """What the memory of a rollout depends on, besides the model.

    Attributes:
        slots: sequences decoded side by side, over all devices.
        prefill_rows: prompts prefilled at once, over all devices.
        prompt_tokens: tokens of the longest prompt.
        cache_length: columns of the KV cache.
        shards: parts that the slots are split into.
        tensor: devices that hold one copy of the parameters together; 1 where each has a whole copy.
    """

    slots: int
    prefill_rows: int
    prompt_tokens: int
    cache_length: int
    shards: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, settings: Settings, *, samples: int, new_tokens: int) -> Self:
        """The sizes of a rollout of `samples` responses a prompt, each of at most `new_tokens` tokens."""
        grid, slots, longest = settings.mesh, settings.rollout.slot_count, settings.data.max_prompt_tokens
        tensor = grid.tensor if settings.rollout.layout == "tensor" else 1
        shards = grid.data * grid.fsdp * grid.tensor // tensor
        return cls(slots, max(1, slots // samples), longest, longest + new_tokens, shards, tensor)


def training_estimate(
    settings: Settings, config: ModelConfig, *, attention: str = "chunked", platform: str = "gpu"
) -> list[Allocation]:
    """What one device holds in a training run, largest first.

    Args:
      attention: the learner's attention; "plain" forms the scores of whole rows, the others do not.
      platform: of the devices, as jax.Device.platform has it.
    """
    grid, offload = settings.mesh, settings.train.offload
    devices, dtype = grid.fsdp * grid.tensor, config.dtype
    whole, trained = parameter_count(config) // devices, trained_count(config) // devices
    moments = _F32 + _SIZE[settings.optimizer.moments_dtype]
    allocations = [
        Allocation("master parameters, float32", _F32 * trained, "always", _MORE_FSDP),
        Allocation("Adam moments, float32", moments * trained, _when(offload, "optimizer"), _MORE_FSDP),
        # A sum over microbatches and the microbatch that is being added.
        Allocation("gradients, float32", 2 * _F32 * trained, "update", _MORE_FSDP),
    ]
    if config.lora is not None:
        phase, remedy = _when(offload, "reference"), f"{_MORE_FSDP} or set train.offload to reference"
        allocations.append(Allocation(f"base model, {dtype}", _SIZE[dtype] * whole, phase, remedy))
    if settings.objective.kl_coef > 0:
        phase, remedy = _when(offload, "reference"), f"{_MORE_FSDP} or set objective.kl_coef to 0"
        name, size = f"reference model, {dtype}", _SIZE[dtype] * whole
        if config.lora is not None:  # whose base is the run's own
            name, size, phase = "reference adapters, float32", _F32 * trained, "always"
        allocations.append(Allocation(name, size, phase, remedy))
    if settings.mixing.active and settings.mixing.method(()).uses_table:
        allocations += _table_allocations(settings, config, platform)
    # The larger rollout of training and evaluation: the longer response, more prompts in a prefill, and
    # weights that are not rounded, which evaluations have whatever rollout.quantize is.
    sizes = RolloutSizes.of(
        settings,
        samples=min(settings.rollout.group, settings.eval.samples),
        new_tokens=max(settings.rollout.max_new_tokens, settings.eval.max_new_tokens),
    )
    allocations += rollout_estimate(config, sizes)
    allocations += _update_allocations(settings, config, attention, platform)
    return sorted(allocations, key=lambda one: -one.size)


def evaluation_estimate(settings: Settings, config: ModelConfig) -> list[Allocation]:
    """What one device holds while `evaluate` samples responses, largest first."""
    own, grid = settings.eval, settings.mesh
    size = _F32 if config.lora is None else _SIZE[config.dtype]
    master = size * (parameter_count(config) // (grid.fsdp * grid.tensor))
    sizes = RolloutSizes.of(settings, samples=own.samples, new_tokens=own.max_new_tokens)
    read = Allocation("parameters as read", master, "always", _MORE_FSDP)
    return sorted([read, *rollout_estimate(config, sizes)], key=lambda one: -one.size)


def rollout_estimate(config: ModelConfig, sizes: RolloutSizes) -> list[Allocation]:
    """What one device holds for a rollout: a copy of the parameters, the KV cache, scratch."""
    compute, tensor = _SIZE[config.dtype], sizes.tensor
    slots, prompts = (-(-count // sizes.shards) for count in (sizes.slots, sizes.prefill_rows))
    # Keys and values of one token.
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * compute
    tokens = prompts * sizes.prompt_tokens
    features = _attention_features(config) + 3 * config.intermediate_size
    hidden = tokens * (3 * config.hidden_size + features // tensor) * compute
    block = min(sizes.prompt_tokens, cached_attention.QUERY_BLOCK)
    scores = prompts * config.num_heads * block * sizes.prompt_tokens * (_F32 + compute) // tensor
    logits = 3 * slots * config.vocab_size * _F32  # as they come, scaled, and as probabilities
    shorter = "lower data.max_prompt_tokens or rollout.slots"
    scratch = Allocation("scratch of prefill", hidden + scores, "rollout", shorter)
    if logits > hidden + scores:  # a prefill and a decode step never run at once
        scratch = Allocation("rollout logits", logits, "rollout", "lower rollout.slots")
    copy = compute * (parameter_count(config) // tensor)
    cache = slots * sizes.cache_length * token // tensor
    prefilled = sizes.prefill_rows * sizes.prompt_tokens * token // tensor
    fewer = "lower rollout.slots, rollout.max_new_tokens or eval.max_new_tokens"
    return [
        Allocation(f"rollout copy, {config.dtype}", copy, "rollout", "raise mesh.tensor"),
        Allocation("KV cache", cache, "rollout", fewer),
        Allocation("keys and values of prefilled prompts", prefilled, "rollout", shorter),
        scratch,
    ]


def peak(allocations: Sequence[Allocation]) -> tuple[int, Phase]:
    """The most bytes held at one time, and the phase in which that is."""
    always, *phases = get_args(Phase)
    worst = max(phases, key=lambda phase: held(allocations, phase))
    return held(allocations, always) + held(allocations, worst), worst


def held(allocations: Sequence[Allocation], phase: Phase) -> int:
    """Bytes of the allocations of this phase; those of "always" count in no other."""
    return sum(one.size for one in allocations if one.phase == phase)


def memory_problem(allocations: Sequence[Allocation], available: int | None) -> str | None:
    """A sentence naming the largest allocations and what to change, where the peak exceeds `available`."""
    needed, phase = peak(allocations)
    if available is None or needed <= available:
        return None
    then = [one for one in allocations if one.phase in ("always", phase)]
    largest = sorted(then, key=lambda one: -one.size)[:2]
    named = " and ".join(f"{format_bytes(one.size)} of {one.name} ({one.remedy})" for one in largest)
    return (
        f"the {phase} needs at least {format_bytes(needed)} on each device, which has "
        f"{format_bytes(available)}; the most is {named}"
    )


def checkpoint_bytes(config: ModelConfig, kept: int) -> int:
    """Disk space for `kept` checkpoints and the one that is being written."""
    return (kept + 1) * _STATE_BYTES * trained_count(config)


def _table_allocations(settings: Settings, config: ModelConfig, platform: str) -> list[Allocation]:
    grid, width = settings.mesh, _F32 * config.hidden_size
    rows, devices = config.vocab_size * width, grid.data * grid.fsdp * grid.tensor
    padded = tiles.make_tiling(config.vocab_size, TILE, devices).rows
    # The embedding with rows of comparable length, and gathered from other devices. Of what the compiler for
    # TPUs gathers along rows alone it may make a copy that lies row by row, as the searches read it.
    copies = 1 + (devices > 1) + (platform == "tpu" and grid.fsdp > 1 and grid.tensor == 1)
    needed = copies * rows + padded * (width + 2 * _F32 * _TILE_MEMORIES)
    moved = rows // (grid.fsdp * grid.tensor) if config.lora is None else 0  # no update moves it there
    return [
        Allocation(
            "scratch of the neighbour table", needed, "table", f"{_MORE_FSDP}, which leaves more room"
        ),
        Allocation("embedding before the update", moved, "update", _MORE_FSDP),
    ]


def _update_allocations(
    settings: Settings, config: ModelConfig, attention: str, platform: str
) -> list[Allocation]:
    train, tensor = settings.train, settings.mesh.tensor
    D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    compute, features = _SIZE[config.dtype], _attention_features(config)
    tokens = train.rows_per_device * settings.row_tokens
    # Attention other than "plain" holds the scores of one pair of blocks, which is little.
    scores = tokens * config.num_heads * settings.row_tokens if attention == "plain" else 0
    # What a layer's backward pass reads: norms, residuals, projections, gate/up/product, scores, weights.
    layer = tokens * (4 * D + (2 * features + 4 * F) // tensor) * compute
    layer += scores * (2 * _F32 + compute) // tensor
    products = tokens * (2 * D + (features + 2 * F) // tensor) * compute
    stored = {"full": 0, "dots": L * products, "none": (L - 1) * layer}[train.remat]
    # ... and the gradients of one layer's inputs, projections, gate/up/product, scores and weights.
    layer += tokens * (2 * D + (features + 3 * F) // tensor) * compute + 2 * scores * _F32 // tensor
    # On a CPU XLA leaves the arithmetic on logits to a library, which keeps each result: measured.
    copies = 8 if platform == "cpu" else 3
    logits = copies * min(train.logprob_chunk, tokens) * config.vocab_size * _F32 // tensor
    # A layer's weights in the compute dtype, and the gradient of its largest where it has one.
    weights = D * (features + config.num_heads * config.head_dim + 3 * F) * compute
    weights += D * F * _F32 if config.lora is None else 0
    gathered = weights // tensor if settings.mesh.fsdp > 1 else 0
    shorter = "lower train.rows_per_device" if train.rows_per_device > 1 else "lower rollout.max_new_tokens"
    remedy = shorter if train.remat == "full" else f"{shorter} or set train.remat to full"
    scratch = [
        Allocation("scratch of a layer", layer, "update", remedy),
        Allocation("logits chunk", logits, "update", "lower train.logprob_chunk"),
    ]
    if platform != "cpu":  # there the head's gradient is complete before that of the layers begins
        scratch = [max(scratch, key=lambda one: one.size)]
    kept = L * tokens * D * compute  # what each layer reads
    if platform == "tpu":  # whose compiler keeps it twice, and casts the layers' weights before their loop
        shards = settings.mesh.fsdp * tensor
        cast = parameter_count(config) - 2 * config.vocab_size * D if config.lora is None else 0
        kept = 2 * kept + compute * cast // shards
    return [
        Allocation("activations of a microbatch", kept + stored, "update", remedy),
        Allocation("weights gathered from other devices", gathered, "update", "raise mesh.tensor"),
        *scratch,
    ]


def _attention_features(config: ModelConfig) -> int:
    """Features of a token's queries, keys and values."""
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def _when(offload: str, what: str) -> Phase:
    """When a device holds what `train.offload` may keep in host memory between updates."""
    return "update" if offload in (what, "both") else "always"
