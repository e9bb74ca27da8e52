"""Whether a run fits: hosts, the model's positions, the devices' memory.

Owns what is refused because of these, one sentence each. Must not know how memory is estimated (memory.py),
nor read a model or any data.
"""

import jax

from ngrpo_jax.errors import UserError
from ngrpo_jax.model import ring_attention
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import capacity, memory
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import attention_name

ESTIMATE_ERROR = 1.12  # what the memory estimate may be too high: benchmarks/targets.py


def check_hosts(settings: Settings, hosts: int) -> None:
    """Refuses prompts that cannot be divided evenly over the hosts."""
    for name, value in (
        ("rollout.prompts", settings.rollout.prompts),
        ("train.mini_batch_prompts", settings.train.mini_batch_prompts),
    ):
        if value % hosts:
            raise UserError(
                f"{name} is {value}, no multiple of the {hosts} processes; each takes an equal share."
            )


def check_offload(settings: Settings, devices: jax.sharding.Mesh) -> None:
    """Refuses `train.offload` where devices have no memory of their own."""
    if settings.train.offload == "none":
        return
    device = mesh.device_of(devices)
    kinds = {space.kind for space in device.addressable_memories()}
    if device.platform == "cpu" or "pinned_host" not in kinds:
        raise UserError(
            f"train.offload is {settings.train.offload!r}, but devices of {device.platform} have no memory "
            "apart from the host's that arrays could be moved out of; set it to none."
        )


def check_decode_attention(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> None:
    """Refuses `rollout.attention` "ring" where no kernel takes the heads of this model."""
    platform, wanted = mesh.device_of(devices).platform, settings.rollout.attention
    if wanted == "ring" and ring_attention.grain(platform, config.head_dim, 1) is None:
        raise UserError(
            f"rollout.attention is {wanted!r}, but on {platform} no kernel takes heads of {config.head_dim} "
            "entries; set it to auto."
        )


def check_positions(settings: Settings, config: ModelConfig) -> None:
    """Refuses a run whose sequences can become longer than the model's positions."""
    new_tokens = max(settings.rollout.max_new_tokens, settings.eval.max_new_tokens)
    named = "the larger of rollout.max_new_tokens and eval.max_new_tokens"
    _refuse_too_long(settings, config, new_tokens, named)


def check_memory(
    settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh
) -> list[memory.Allocation]:
    """Refuses a run that is too large for its devices by the estimate, which it returns."""
    allocations = training_memory(settings, config, devices)
    _refuse_too_large(allocations, devices)
    return allocations


def check_evaluation(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> int:
    """Refuses an evaluation longer than the model's positions, or too large for its devices.

    Returns the bytes that it needs on each device, by estimate.
    """
    check_decode_attention(settings, config, devices)
    _refuse_too_long(settings, config, settings.eval.max_new_tokens, "eval.max_new_tokens")
    allocations = memory.evaluation_estimate(settings, config)
    _refuse_too_large(allocations, devices)
    return memory.peak(allocations)[0]


def training_memory(
    settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh
) -> list[memory.Allocation]:
    """What one device holds in this run on these devices, by estimate."""
    name, platform = attention_name(settings, devices), mesh.device_of(devices).platform
    return memory.training_estimate(settings, config, attention=name, platform=platform)


def _refuse_too_long(settings: Settings, config: ModelConfig, new_tokens: int, named: str) -> None:
    longest = settings.data.max_prompt_tokens + new_tokens
    if longest > config.max_positions:
        raise UserError(
            f"the model has {config.max_positions} positions, but data.max_prompt_tokens with {named} needs "
            f"{longest}; lower one of them."
        )


def _refuse_too_large(allocations: list[memory.Allocation], devices: jax.sharding.Mesh) -> None:
    available = capacity.available_memory(devices)
    allowed = None if available is None else int(ESTIMATE_ERROR * available)
    problem = memory.memory_problem(allocations, allowed)
    if problem:
        raise UserError(problem)
