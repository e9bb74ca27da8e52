"""Does a run fit? Its lengths against the model's positions, its memory and its parts against the devices.

Owns what is refused because of these, one sentence each, and what settings mean for the estimate of memory.
Must not know how that estimate is made (runtime/memory.py), nor read a model or any data.
"""

from __future__ import annotations

import dataclasses

import jax

from ngrpo_jax.model import inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import memory
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import attention_name

ESTIMATE_ERROR = 1.2  # the memory estimate may be a fifth too high


def check_hosts(settings: Settings, hosts: int) -> None:
    """Refuses prompts that cannot be divided evenly over the hosts."""
    for name, value in (
        ("rollout.prompts", settings.rollout.prompts),
        ("train.mini_batch_prompts", settings.train.mini_batch_prompts),
    ):
        if value % hosts:
            raise ValueError(
                f"{name} is {value}, no multiple of the {hosts} processes; each takes an equal share."
            )


def check_offload(settings: Settings) -> None:
    """Refuses to move arrays to the memory of the host where devices have none of their own."""
    if settings.train.offload == "none":
        return
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if device.platform == "cpu" or "pinned_host" not in kinds:
        raise ValueError(
            f"train.offload is {settings.train.offload!r}, but devices of {device.platform} have no memory "
            "apart from the host's that arrays could be moved out of; set it to none."
        )


def check_sizes(settings: Settings, config: ModelConfig) -> None:
    """Refuses a run longer than the model's positions, or too large for its devices by the estimate."""
    check_positions(settings, config)
    check_memory(settings, config)


def check_positions(settings: Settings, config: ModelConfig) -> None:
    """Refuses a run whose sequences can become longer than the model's positions."""
    new_tokens = max(settings.rollout.max_new_tokens, settings.eval.max_new_tokens)
    named = "the larger of rollout.max_new_tokens and eval.max_new_tokens"
    _refuse_too_long(settings, config, new_tokens, named)


def check_memory(settings: Settings, config: ModelConfig) -> None:
    """Refuses a run that is too large for its devices by the estimate."""
    _refuse_too_large(memory_parts(settings, config))


def check_evaluation(settings: Settings, config: ModelConfig) -> None:
    """Refuses an evaluation longer than the model's positions, or too large for its devices."""
    _refuse_too_long(settings, config, settings.eval.max_new_tokens, "eval.max_new_tokens")
    _refuse_too_large(evaluation_memory(settings, config))


def memory_parts(settings: Settings, config: ModelConfig) -> list[memory.Part]:
    """What one device holds in this run, by estimate."""
    return memory.memory_estimate(config, run_shape(settings))


def evaluation_memory(settings: Settings, config: ModelConfig) -> list[memory.Part]:
    """What one device holds while `evaluate` writes responses, by estimate."""
    own = settings.eval
    shape = _writing_shape(settings, samples=own.samples, new_tokens=own.max_new_tokens)
    return memory.evaluation_estimate(config, shape)


def run_shape(settings: Settings) -> memory.RunShape:
    """The numbers of a run on these devices that memory depends on."""
    rollout, held_out = settings.rollout, settings.eval
    return dataclasses.replace(
        _writing_shape(
            settings,
            samples=min(rollout.group, held_out.samples),
            new_tokens=max(rollout.max_new_tokens, held_out.max_new_tokens),
        ),
        rows_per_device=settings.train.rows_per_device,
        row_tokens=settings.row_tokens,
        logprob_chunk=settings.train.logprob_chunk,
        attention=attention_name(settings),
        offload=settings.train.offload,
        reference=settings.objective.kl_coef > 0,
        table=settings.mixing.active and settings.mixing.method(()).uses_table,
        # XLA hands the arithmetic on logits to a library there, which keeps each step of it: measured.
        logits_copies=8 if jax.local_devices()[0].platform == "cpu" else 3,
    )


def rollout_shards(settings: Settings) -> int:
    """Parts that the slots of a rollout are split into."""
    grid = settings.mesh
    return grid.data * grid.fsdp * (grid.tensor if settings.rollout.layout == "replicated" else 1)


def available_memory() -> int | None:
    """Bytes that one device of this host may use; None where nobody tells."""
    return memory.device_memory(jax.local_devices()[0], sharers=jax.local_device_count())


def _writing_shape(settings: Settings, *, samples: int, new_tokens: int) -> memory.RunShape:
    """The numbers of a run that only writes responses so long, so many a prompt at the least."""
    grid, slots = settings.mesh, settings.rollout.slots
    return memory.RunShape(
        data=grid.data,
        fsdp=grid.fsdp,
        tensor=grid.tensor,
        rollout_tensor=grid.tensor if settings.rollout.layout == "tensor" else 1,
        rollout_shards=rollout_shards(settings),
        slots=slots,
        cache_length=settings.data.max_prompt_tokens + new_tokens,
        prefill_rows=max(1, slots // samples),
        prompt_tokens=settings.data.max_prompt_tokens,
        query_block=inference.QUERY_BLOCK,
        rows_per_device=0,
        row_tokens=0,
        logprob_chunk=0,
        remat=settings.train.remat,
        reference=False,
    )


def _refuse_too_long(settings: Settings, config: ModelConfig, new_tokens: int, named: str) -> None:
    longest = settings.data.max_prompt_tokens + new_tokens
    if longest > config.max_positions:
        raise ValueError(
            f"the model has {config.max_positions} positions, but data.max_prompt_tokens with {named} needs "
            f"{longest}; lower one of them."
        )


def _refuse_too_large(parts: list[memory.Part]) -> None:
    available = available_memory()
    allowed = None if available is None else int(ESTIMATE_ERROR * available)
    problem = memory.memory_problem(parts, allowed)
    if problem:
        raise ValueError(problem)
