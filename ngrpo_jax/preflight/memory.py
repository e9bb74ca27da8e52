"""Will this run fit and start? Questions that are cheap to ask before slow work, and change nothing.

Owns the estimate of memory per device, by phase, and the check of a workdir. Plain numbers in: it must not
know how a step is computed, only what sizes that takes. `model` is anything with the size attributes of
ModelConfig.

The estimate counts the arrays that grow with a setting. benchmarks/memory.py holds it to what the kernel
counts on CPU, within 15 %: enough to tell what will not fit and which setting to lower, no promise that a run
which passes by little will fit.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ngrpo_jax.runtime.console import format_bytes

_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_F32 = 4
_SPREAD = "raise mesh.fsdp"
_MEMORIES = 512  # of each row while a neighbour table is made (algo/tiles.py): two numbers of four bytes
# float32 master parameters and the two moments of Adam: what is held, and what a checkpoint writes.
_STATE_BYTES = 3 * _F32

Phase = Literal["always", "table", "rollout", "update"]  # all but the first never at the same time


class Part(NamedTuple):
    """One share of a device's memory: what it is, bytes, when it is held, and what makes it smaller."""

    name: str
    size: int
    phase: Phase
    remedy: str


@dataclasses.dataclass(frozen=True)
class RunShape:
    """The numbers of a run that memory depends on; one field, one setting.

    Attributes:
        data, fsdp, tensor: mesh sizes.
        rollout_tensor: devices that share one rollout copy: `tensor`, or 1 where each holds a whole one.
        rollout_shards: parts that the slots are split into.
        slots: sequences decoded side by side, over all devices.
        cache_length: positions of a slot's cache.
        prefill_rows, prompt_tokens: prompts read at once, over all devices, and tokens of the longest.
        query_block: tokens of a prompt whose attention scores exist at once.
        rows_per_device, row_tokens: packed rows of a microbatch on one device, and their length.
        logprob_chunk: tokens whose logits exist at once.
        remat: "none", "dots" or "full".
        attention: "plain", which forms the scores of whole rows, or another, which does not.
        offload: what waits in host memory: "none", "optimizer", "reference" or "both".
        reference: whether a frozen copy of the model is held for the KL term.
        table: whether a neighbour table is kept.
        logits_copies: arrays of the size of a chunk's logits that the update holds at once.
    """

    data: int
    fsdp: int
    tensor: int
    rollout_tensor: int
    rollout_shards: int
    slots: int
    cache_length: int
    prefill_rows: int
    prompt_tokens: int
    query_block: int
    rows_per_device: int
    row_tokens: int
    logprob_chunk: int
    remat: str
    reference: bool
    table: bool = False
    logits_copies: int = 3
    attention: str = "chunked"
    offload: str = "none"


def parameter_count(model: Any) -> int:
    """Number of parameters of a decoder with these sizes."""
    D, F, H = model.hidden_size, model.intermediate_size, model.head_dim
    N, K = model.num_heads, model.num_kv_heads
    layer = 2 * D + 2 * D * N * H + 2 * D * K * H + 3 * D * F
    layer += (N + 2 * K) * H * model.qkv_bias + 2 * H * model.qk_norm
    tables = model.vocab_size * D * (1 if model.tie_embeddings else 2)
    return tables + D + model.num_layers * layer


def forward_flops(model: Any, prompt_tokens: int, response_tokens: int) -> float:
    """Operations of the products that one pass over a sequence needs: two for each weight and token.

    The head counts at response positions alone, the embedding's look-up not at all, and attention with what
    a causal mask leaves of it.
    """
    tokens = prompt_tokens + response_tokens - 1
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    body = 2 * (parameter_count(model) - tables) * tokens
    seen = 2 * model.num_layers * model.num_heads * model.head_dim * tokens * (tokens + 1)
    return float(body + seen + 2 * model.vocab_size * model.hidden_size * response_tokens)


def memory_estimate(model: Any, run: RunShape) -> list[Part]:
    """What one device holds, largest first."""
    count, compute = parameter_count(model), _SIZE[model.dtype]
    shard = count // (run.fsdp * run.tensor)
    parts = [
        Part("master parameters, float32", _F32 * shard, "always", _SPREAD),
        Part("Adam moments, float32", 2 * _F32 * shard, _when(run, "optimizer"), _SPREAD),
        # A sum over microbatches and the microbatch that is being added.
        Part("gradients, float32", 2 * _F32 * shard, "update", _SPREAD),
        Part(
            f"rollout copy, {model.dtype}",
            compute * (count // run.rollout_tensor),
            "rollout",
            "raise mesh.tensor",
        ),
    ]
    if run.reference:
        remedy = f"{_SPREAD} or set objective.kl_coef to 0"
        parts.append(
            Part(f"reference model, {model.dtype}", compute * shard, _when(run, "reference"), remedy)
        )
    if run.table:
        parts += _table_parts(model, run)
    parts += _rollout_parts(model, run, compute) + _update_parts(model, run, compute)
    return sorted(parts, key=lambda part: -part.size)


def evaluation_estimate(model: Any, run: RunShape) -> list[Part]:
    """What one device holds while it only writes responses, largest first: nothing that learns."""
    count, compute = parameter_count(model), _SIZE[model.dtype]
    master = _F32 * (count // (run.fsdp * run.tensor))
    copy = compute * (count // run.rollout_tensor)
    parts = [
        Part("parameters as read, float32", master, "always", _SPREAD),
        Part(f"rollout copy, {model.dtype}", copy, "always", "raise mesh.tensor"),
        *_rollout_parts(model, run, compute),
    ]
    return sorted(parts, key=lambda part: -part.size)


def peak(parts: Sequence[Part]) -> tuple[int, Phase]:
    """Bytes held at the worst moment, and the phase that it falls into."""
    always, *others = (held(parts, phase) for phase in get_args(Phase))
    worst = max(range(len(others)), key=others.__getitem__)
    return always + others[worst], get_args(Phase)[1 + worst]


def held(parts: Sequence[Part], phase: Phase) -> int:
    """Bytes of the parts of one phase, without those that are always there."""
    return sum(part.size for part in parts if part.phase == phase)


def memory_problem(parts: Sequence[Part], available: int | None) -> str | None:
    """A sentence naming the largest parts and what to change, where the peak exceeds `available` bytes."""
    needed, phase = peak(parts)
    if available is None or needed <= available:
        return None
    most = sorted((p for p in parts if p.phase in ("always", phase)), key=lambda part: -part.size)[:2]
    largest = " and ".join(f"{format_bytes(p.size)} of {p.name} ({p.remedy})" for p in most)
    return (
        f"the {phase} needs at least {format_bytes(needed)} on each device, which has "
        f"{format_bytes(available)}; the most is {largest}"
    )


def device_memory(device: Any, sharers: int = 1) -> int | None:
    """Bytes that a device may use; None where nobody tells.

    Args:
        device: a jax.Device.
        sharers: devices that draw on the same host memory, for CPU devices (jax.local_device_count()).
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    free = [size for size in (_meminfo_available(), _cgroup_available()) if size is not None]
    return min(free) // sharers if free else None


def checkpoint_bytes(model: Any, kept: int) -> int:
    """Disk space for `kept` checkpoints and the one that is being written."""
    return (kept + 1) * _STATE_BYTES * parameter_count(model)


def check_workdir(workdir: str | os.PathLike[str], needed_bytes: int = 0) -> None:
    """Asks whether the workdir can be written, or made, and has room; writes nothing.

    Raises:
        ValueError: it is a file, may not be written, or lies on a disk with less free than `needed_bytes`.
    """
    path = Path(workdir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--workdir {path} is a file; name a directory")
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(
            f"--workdir {path} cannot be made, because {existing} is a file; name another directory"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        verb = "written" if path.exists() else f"made, because {existing} may not be written"
        raise ValueError(f"--workdir {path} cannot be {verb}; name another directory")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(
            f"--workdir {path} lies on a disk with {format_bytes(free)} free, and the checkpoints of this "
            f"model need {format_bytes(needed_bytes)}; name a directory on another disk"
        )


def _rollout_parts(model: Any, run: RunShape, compute: int) -> list[Part]:
    slots, prompts = (-(-count // run.rollout_shards) for count in (run.slots, run.prefill_rows))
    split = run.rollout_tensor
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * compute  # keys and values of a token
    tokens = prompts * run.prompt_tokens
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    hidden = tokens * (3 * model.hidden_size + (heads + 3 * model.intermediate_size) // split) * compute
    block = min(run.prompt_tokens, run.query_block)
    scores = prompts * model.num_heads * block * run.prompt_tokens * (_F32 + compute) // split
    logits = 3 * slots * model.vocab_size * _F32  # as they come, scaled, and as probabilities
    shorter = "lower data.max_prompt_tokens or rollout.slots"
    scratch = Part("scratch of prefill", hidden + scores, "rollout", shorter)
    if logits > hidden + scores:  # a prefill and a decode step never run at once
        scratch = Part("rollout logits", logits, "rollout", "lower rollout.slots")
    cache = slots * run.cache_length * token // split
    prefilled = run.prefill_rows * run.prompt_tokens * token // split
    fewer = "lower rollout.slots, rollout.max_new_tokens or eval.max_new_tokens"
    return [
        Part("KV cache", cache, "rollout", fewer),
        Part("keys and values of prefilled prompts", prefilled, "rollout", shorter),
        scratch,
    ]


def _table_parts(model: Any, run: RunShape) -> list[Part]:
    rows = _F32 * model.vocab_size * model.hidden_size
    # In comparable length, filled up to whole tiles, and gathered from other devices.
    copies = 2 if run.data * run.fsdp * run.tensor == 1 else 3
    needed = copies * rows + 2 * _F32 * _MEMORIES * model.vocab_size
    moved = rows // (run.fsdp * run.tensor)
    return [
        Part("scratch of the neighbour table", needed, "table", f"{_SPREAD}, which leaves it more room"),
        Part("embedding before the update", moved, "update", _SPREAD),
    ]


def _update_parts(model: Any, run: RunShape, compute: int) -> list[Part]:
    D, F, L = model.hidden_size, model.intermediate_size, model.num_layers
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    tokens = run.rows_per_device * run.row_tokens
    # What is not plain holds the scores of a pair of blocks, which is little.
    seen = run.row_tokens if run.attention == "plain" else 0
    scores = tokens * model.num_heads * seen
    # What a layer keeps: norms and residuals, projections, gate/up/product, scores and weights.
    working = tokens * (4 * D + (2 * heads + 4 * F) // run.tensor) * compute
    working += scores * (2 * _F32 + compute) // run.tensor
    products = tokens * (2 * D + (heads + 2 * F) // run.tensor) * compute
    kept = {"full": working, "dots": L * products + working, "none": L * working}[run.remat]
    # The gradients of one layer's: of what goes in, projections, gate/up/product, scores and weights.
    kept += tokens * (2 * D + (heads + 3 * F) // run.tensor) * compute + 2 * scores * _F32 // run.tensor
    chunk = min(run.logprob_chunk, tokens)
    # Tokens are looked up in whole rows, and gradients are whole rows: by XLA's account of a sharded update.
    gathered = 2 * _F32 * model.vocab_size * D // run.tensor if run.fsdp > 1 else 0
    shorter = "lower train.rows_per_device" if run.rows_per_device > 1 else "lower rollout.max_new_tokens"
    deeper = "" if run.remat == "full" else " or set train.remat to full"
    return [
        Part("activations of a microbatch", L * tokens * D * compute + kept, "update", shorter + deeper),
        Part(
            "logits chunk",
            run.logits_copies * chunk * model.vocab_size * _F32 // run.tensor,
            "update",
            "lower train.logprob_chunk",
        ),
        Part("tables gathered from other devices", gathered, "update", "raise mesh.tensor"),
    ]


def _when(run: RunShape, what: str) -> Phase:
    """When a device holds something that may wait in host memory."""
    return "update" if run.offload in (what, "both") else "always"


def _meminfo_available(path: str = "/proc/meminfo") -> int | None:
    if not os.path.exists(path):
        return None
    for line in Path(path).read_text(encoding="ascii").split("\n"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available(directory: str = "/sys/fs/cgroup") -> int | None:
    """What a container's limit leaves (cgroup v2), its file cache counted as free; None without a limit."""
    limit, used, stat = (Path(directory, f"memory.{name}") for name in ("max", "current", "stat"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    lines = stat.read_text().split("\n") if stat.exists() else []
    cache = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return int(limit.read_text()) - int(used.read_text()) + cache
