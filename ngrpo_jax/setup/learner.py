"""The learner of a run: its programs, its optimiser, and the shapes and shardings of its state.

Owns how settings become the arguments of learner/. Must not know rollouts, nor the order of a step.
"""

from typing import Any, NamedTuple

import jax

from ngrpo_jax.learner import update
from ngrpo_jax.learner.loss import ForwardOptions
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.learner.packing import RowLayout
from ngrpo_jax.model import attention, decoder, layers
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import Settings


class Learner(NamedTuple):
    """The programs of the update, and what its state looks like; nothing is compiled and no array made."""

    programs: update.Programs
    optimizer: Any
    abstract: update.TrainState  # of jax.ShapeDtypeStruct
    shardings: update.TrainState


def make_learner(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> Learner:
    """The update of a run with these settings on this mesh."""
    optimizer = make_optimizer(settings.optimizer)
    shapes = decoder.parameter_shapes(config)
    abstract = jax.eval_shape(lambda params: update.init_state(params, optimizer), shapes)
    shardings = mesh.state_shardings(devices, abstract)
    programs = update.compile_programs(
        forward_options(settings, config, devices),
        settings.objective,
        optimizer,
        state_shardings=shardings,
        rows_sharding=mesh.rows_sharding(devices),
        offload=settings.train.offload,
    )
    return Learner(programs, optimizer, abstract, shardings)


def forward_options(settings: Settings, config: ModelConfig, devices: jax.sharding.Mesh) -> ForwardOptions:
    """How the learner computes log-probabilities in this run."""
    train, platform = settings.train, mesh.device_of(devices).platform
    return ForwardOptions(
        config,
        settings.rollout.temperature,
        remat=train.remat,
        logprob_chunk=train.logprob_chunk,
        attend=attention.make(attention_name(settings, devices), platform),
        unroll=train.unroll,
        rotate=layers.rotate_by_product if platform == "tpu" else layers.rotate,
    )


def row_layout(settings: Settings, hosts: int) -> RowLayout:
    """The packed rows of one of so many hosts."""
    rows = settings.train.rows_per_device * settings.mesh.data * settings.mesh.fsdp
    return RowLayout(settings.row_tokens, rows // hosts, settings.train.share_prompts)


def old_logprobs(settings: Settings) -> str:
    """Where the update's old log-probabilities come from, as `update.compute_logprobs` takes it.

    A batch of one optimiser step needs no pass for them: they are the log-probabilities of that step.
    """
    if settings.objective.old_logprobs == "sampler":
        return "sampler"
    return "update" if settings.mini_batches == 1 else "learner"


def attention_name(settings: Settings, devices: jax.sharding.Mesh) -> str:
    """The learner's attention, "auto" resolved; UserError where these devices cannot run it."""
    return attention.choose(
        settings.train.attention,
        platform=mesh.device_of(devices).platform,
        row_tokens=settings.row_tokens,
        shared_prefixes=settings.train.share_prompts,
        dtype=settings.model.dtype,
    )
