"""A model ready to write, and its responses: what training steps and evaluations share of the rollout.

Owns the rollout's copy of the parameters, how many responses are drawn and by which law, and the key of each.
Must not know what responses are for: neither scores nor updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.neighbors import neighbor_table, refresh
from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import compiling, decode, engine
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import console, distributed, mesh
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo
from ngrpo_jax.tasks import prompts


def build_table(params: Any, model_spec: ModelSpec, devices: jax.sharding.Mesh) -> jax.Array | None:
    """The neighbour table of these parameters, or None where the strategy mixes without one.

    Special tokens, unused rows and tokens kept out of mixing are nobody's neighbours.
    """
    tokenizer_info, mixing = model_spec.tokenizer_info, model_spec.tokenizer_info.mixing
    if not mixing.uses_table:
        return None
    return neighbor_table(
        decoder.table_rows(params, model_spec.config, mixing.table),
        mixing.k,
        metric=mixing.metric,
        valid_V=tokenizer_info.usable_V,
        group_V=tokenizer_info.spelling_V,
        mesh=devices,
    )


EVAL_STREAM = 0  # rollouts of training step s draw from stream s, which counts from 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model ready to write: rollout-layout parameters and all that its responses depend on."""

    params: Any
    config: ModelConfig
    tokenizer_info: TokenizerInfo
    table_VC: jax.Array | None
    sharding: jax.sharding.NamedSharding


def make_policy(
    model_spec: ModelSpec, devices: jax.sharding.Mesh, params: Any, table_VC: Any | None, layout: str
) -> Policy:
    """The rollout's copy of parameters: compute dtype, laid out for decoding, split as `layout` says.

    Each host gets its own, on its own devices; every process has to call this.
    """
    laid_out = inference.lay_out(params, model_spec.config)
    laid_out = mesh.on_this_host(laid_out, mesh.param_shardings(devices, laid_out, layout=layout))
    if table_VC is not None:
        table_VC = mesh.on_this_host(table_VC, mesh.replicated(devices))
    slots = mesh.slots_sharding(mesh.local_mesh(devices), layout)
    return Policy(laid_out, model_spec.config, model_spec.tokenizer_info, table_VC, slots)


@dataclasses.dataclass(frozen=True)
class Draws:
    """How many responses, how long, and by which law."""

    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    mixes: bool


def training_draws(settings: Settings) -> Draws:
    """The rollouts of training."""
    own = settings.rollout
    return Draws(own.group, own.max_new_tokens, own.temperature, 1.0, 0, settings.mixing.active)


def evaluation_draws(settings: Settings) -> Draws:
    """The responses of an evaluation."""
    own = settings.eval
    mixes = own.mixing and settings.mixing.active
    return Draws(own.samples, own.max_new_tokens, own.temperature, own.top_p, own.top_k, mixes)


def own_slots(settings: Settings) -> int:
    """This host's part of `rollout.slots`."""
    return -(-settings.rollout.slots // distributed.process().count)


def sequence_keys(seed: int, stream: int, numbers_B: np.ndarray) -> jax.Array:
    """One key a sequence: a function of the run's seed, the stream (training step), and its number."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers_B))


def sequence_numbers(prompts: int, samples: int) -> np.ndarray:
    """The numbers of this host's sequences among those of all hosts, int [B], given its prompts.

    Hosts take turns prompt by prompt, as `run.step.problems_of` shares them; so a sequence has the key that
    it would have in a run of one process.
    """
    process = distributed.process()
    prompts_P = process.index + process.count * np.arange(prompts)
    return (prompts_P[:, None] * samples + np.arange(samples)).reshape(-1)


def evaluation_keys(seed: int, name: str, problems: Sequence[int], samples: int) -> jax.Array:
    """One key a response of these problems of a data set, prompt-major.

    A function of the seed, the set's name, the problem's number and the sample's number alone: what a
    response becomes depends neither on where an evaluation was interrupted nor on how many samples it draws.
    """
    key = jax.random.fold_in(jax.random.key(seed), EVAL_STREAM)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    numbers_B2 = np.stack(np.meshgrid(problems, range(samples), indexing="ij"), axis=-1).reshape(-1, 2)
    by_problem = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers_B2[:, 0]))
    return jax.vmap(jax.random.fold_in)(by_problem, jnp.asarray(numbers_B2[:, 1]))


def write_responses(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    settings: Settings,
    *,
    label: str,
    stream: int,
    draws: Draws,
    keys_B: jax.Array | None = None,
    progress: console.Progress | None = None,
    done_before: int = 0,
) -> Trajectories:
    """Responses to each of this host's prompts, with a live line of sequences done, tokens and time left.

    Args:
      keys_B: the sequences' keys; None for those of the seed and the stream.
      progress: a line that these responses are part of; None for one of their own.
      done_before: sequences that this line already counts.
    """
    count, process = len(prompt_ids) * draws.samples, distributed.process()
    own_line = None
    if progress is None:
        own_line = console.Progress(label, count, "sequences", keep=False, enabled=process.primary)
    if keys_B is None:
        keys_B = sequence_keys(settings.seed, stream, sequence_numbers(len(prompt_ids), draws.samples))
    with own_line or contextlib.nullcontext(progress) as line:
        assert line is not None
        return engine.generate(
            policy.params,
            policy.config,
            prompt_ids,
            samples=draws.samples,
            max_new_tokens=draws.max_new_tokens,
            temperature=draws.temperature,
            top_p=draws.top_p,
            top_k=draws.top_k,
            mixing=policy.tokenizer_info.mixing if draws.mixes else None,
            table_VC=policy.table_VC if draws.mixes else None,
            stop_ids=policy.tokenizer_info.stop_ids,
            keys_B=keys_B,
            slots=own_slots(settings),
            chunk=settings.rollout.chunk,
            max_prompt_tokens=settings.data.max_prompt_tokens,
            sharding=policy.sharding,
            progress=lambda stats: line.update(done_before + stats.done, _in_words(stats)),
        )


def plan_of(
    config: ModelConfig,
    tokenizer_info: TokenizerInfo,
    settings: Settings,
    draws: Draws,
    sharding: jax.sharding.NamedSharding,
) -> compiling.Plan:
    """What such draws ask of this host's rollout."""
    mixing = tokenizer_info.mixing if draws.mixes else engine.NO_MIXING
    return compiling.Plan(
        config,
        decode.Sampler(draws.temperature, draws.top_p, draws.top_k, mixing, tuple(tokenizer_info.stop_ids)),
        samples=draws.samples,
        max_new_tokens=draws.max_new_tokens,
        slots=own_slots(settings),
        chunk=settings.rollout.chunk,
        max_prompt_tokens=settings.data.max_prompt_tokens,
        sharding=sharding,
    )


def compile_ahead(policy: Policy, settings: Settings, draws: Draws) -> float:
    """Compiles everything that `write_responses` will need for such draws; seconds."""
    mixing, table_VC = policy.tokenizer_info.mixing, None
    if draws.mixes and mixing.uses_table:
        table_VC = policy.table_VC
        if table_VC is None:  # of the right shape and place; its entries do not matter here
            table_VC = jax.device_put(
                np.zeros((policy.config.vocab_size, mixing.k), np.int32),
                mesh.replicated(policy.sharding.mesh),  # type: ignore[arg-type]
            )
    plan = plan_of(policy.config, policy.tokenizer_info, settings, draws, policy.sharding)
    return compiling.compile_ahead(policy.params, plan, table_VC)


def failures(trajectories: Trajectories, samples: int, ids: Sequence[str]) -> str | None:
    """A sentence about the responses that ended in logits that are no finite numbers; None without any."""
    failed = np.flatnonzero(trajectories.failed_B).tolist()
    found = sorted({ids[index // samples] for index in failed})
    if not found:
        return None
    named = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return f"{len(failed)} responses ended in logits that are not finite, to the problems {named}"


def response_texts(tokenizer_info: TokenizerInfo, trajectories: Trajectories) -> list[str]:
    """The text of each response, as it is graded."""
    count = len(trajectories.lengths_B)
    return [prompts.response_text(tokenizer_info.tokenizer, trajectories.response(i)) for i in range(count)]


def _in_words(stats: engine.Stats) -> str:
    rate = console.format_rate(stats.tokens / max(stats.decode_s + stats.prefill_s, 1e-9), "tokens")
    return f"{console.format_count(stats.tokens)} tokens, {rate}, {100 * stats.occupancy:.0f} % of slots busy"


def table_config(model_spec: ModelSpec, devices: jax.sharding.Mesh) -> refresh.TableConfig:
    """How the neighbour table of these settings is made and kept: on all devices."""
    mixing = model_spec.tokenizer_info.mixing
    return refresh.TableConfig(mixing.k, mixing.metric, devices)
