"""A model ready to generate, and what is asked of it: shared by training, evaluation and preflight.

Owns the rollout's copy of the parameters, the requests of training and evaluation, and the key of each
sequence. Must not know what responses are for: neither rewards nor updates.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import engine, programs
from ngrpo_jax.rollout.request import NO_MIXING, RolloutRequest, SamplingParams, make_sequences
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import console, distributed, ending, mesh
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo
from ngrpo_jax.tasks import prompts, rows

EVAL_STREAM = 0  # rollouts of training step s sample from stream s, which counts from 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model ready to generate: everything that its responses depend on besides request and keys.

    Attributes:
      params: in the inference layout and the compute dtype; jax.ShapeDtypeStruct in an abstract policy.
      table_VC: neighbour table; None where no request mixes by one.
      sharding: of the slots.
      hosts: how many hosts generate, each its share of the responses.
      longest_prompt: tokens of the longest prompt that is to be answered, for which caches have room; None:
        `data.max_prompt_tokens`.
    """

    params: Any
    config: ModelConfig
    tokenizer_info: TokenizerInfo
    table_VC: Any | None
    sharding: jax.sharding.NamedSharding
    hosts: int
    longest_prompt: int | None = None


def make_policy(
    model_spec: ModelSpec,
    devices: jax.sharding.Mesh,
    params: Any,
    table_VC: Any | None,
    layout: str,
    longest_prompt: int | None = None,
    quantize: str | None = None,
) -> Policy:
    """A policy with a copy of these parameters, split as `layout` says and rounded as `quantize` does.

    Each host gets a copy of its own, on its own devices; every process has to call this.
    """
    copy = inference.to_inference_layout(params, model_spec.config, quantize)
    copy = mesh.on_this_host(copy, mesh.param_shardings(devices, copy, layout=layout))
    if table_VC is not None:
        table_VC = mesh.on_this_host(table_VC, mesh.replicated(devices))
    slots = mesh.slots_sharding(mesh.local_mesh(devices), layout)
    info, hosts = model_spec.tokenizer_info, mesh.hosts(devices)
    return Policy(copy, model_spec.config, info, table_VC, slots, hosts, longest_prompt)


def abstract_policy(
    config: ModelConfig,
    tokenizer_info: TokenizerInfo,
    devices: jax.sharding.Mesh,
    layout: str,
    quantize: str | None = None,
) -> Policy:
    """The same with shapes in the place of arrays: for compiling alone."""
    local, mixing = mesh.local_mesh(devices), tokenizer_info.mixing
    shapes = jax.eval_shape(
        lambda params: inference.to_inference_layout(params, config, quantize),
        decoder.parameter_shapes(config),
    )
    params = mesh.shapes_on(shapes, mesh.param_shardings(local, shapes, layout=layout))
    table_VC = jax.ShapeDtypeStruct((config.vocab_size, mixing.k), jnp.int32, sharding=mesh.replicated(local))
    slots = mesh.slots_sharding(local, layout)
    return Policy(params, config, tokenizer_info, table_VC, slots, mesh.hosts(devices))


def training_request(policy: Policy, settings: Settings) -> RolloutRequest:
    """What a training step asks of this host's rollout."""
    own, mixes = settings.rollout, settings.mixing.active
    return _request(policy, settings, own.select(SamplingParams), own.group, own.max_new_tokens, mixes)


def evaluation_request(policy: Policy, settings: Settings) -> RolloutRequest:
    """What an evaluation asks of this host's rollout."""
    own, mixes = settings.eval, evaluation_mixes(settings)
    return _request(policy, settings, own.select(SamplingParams), own.samples, own.max_new_tokens, mixes)


def evaluation_mixes(settings: Settings) -> bool:
    """Whether responses of an evaluation may have mixed inputs."""
    return settings.eval.mixing and settings.mixing.active


def _request(
    policy: Policy, settings: Settings, drawn: dict[str, Any], samples: int, max_new_tokens: int, mixes: bool
) -> RolloutRequest:
    """A request for responses whose tokens are drawn as `drawn` says, by the names of `SamplingParams`."""
    info = policy.tokenizer_info
    sampling = drawn | {"mixing": info.mixing if mixes else NO_MIXING}
    return RolloutRequest(
        policy.config,
        SamplingParams(**sampling, stop_ids=tuple(info.stop_ids)),
        samples=samples,
        max_new_tokens=max_new_tokens,
        slots=-(-settings.rollout.slot_count // policy.hosts),
        chunk=settings.rollout.chunk,
        max_prompt_tokens=policy.longest_prompt or settings.data.max_prompt_tokens,
        sharding=policy.sharding,
        attention=settings.rollout.attention,
    )


def compile_rollouts(policy: Policy, requests: Sequence[RolloutRequest]) -> None:
    """Compiles everything that rollouts of these requests need, and prints how long it took."""
    primary, seconds = distributed.process().primary, 0.0
    for number, request in enumerate(requests, 1):
        label = f"compiling rollouts {number} of {len(requests)}"
        with console.Progress(label, 1, "sizes", keep=False, enabled=primary) as progress:
            seconds += programs.compile_ahead(policy.params, request, policy.table_VC, progress.count)
    if requests and primary:
        console.say(f"rollouts   compiled for every size in {console.format_seconds(seconds)}")


def write_responses(
    policy: Policy,
    request: RolloutRequest,
    prompt_ids: Sequence[Sequence[int]],
    keys_B: jax.Array,
    *,
    progress: console.Progress,
    done_before: int = 0,
) -> Trajectories:
    """Responses to each of this host's prompts, prompt-major.

    Args:
      keys_B: one key a sequence.
      progress: a line that is told of sequences done and tokens.
      done_before: sequences that this line counts already.
    """
    return engine.rollout(
        policy.params,
        request,
        make_sequences(request, prompt_ids, keys_B),
        table_VC=policy.table_VC,
        progress=lambda stats: _between_chunks(progress, done_before, stats),
    )


def _between_chunks(progress: console.Progress, done_before: int, stats: engine.RolloutStats) -> None:
    ending.pause()
    progress.update(done_before + stats.done, _in_words(stats))


def _in_words(stats: engine.RolloutStats) -> str:
    rate = console.format_rate(stats.tokens / max(stats.decode_s + stats.prefill_s, 1e-9), "tokens")
    return f"{console.format_count(stats.tokens)} tokens, {rate}, {100 * stats.occupancy:.0f} % of slots busy"


def sequence_keys(seed: int, stream: int, numbers_B: np.ndarray) -> jax.Array:
    """One key a sequence: a function of the run's seed, the stream (training step), and its number."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers_B))


def sequence_numbers(prompts: int, samples: int) -> np.ndarray:
    """The numbers of this host's sequences among those of all hosts, int [B], given its prompts.

    Host h of H has every H-th prompt, as `run.step.problems_of` shares them; so a sequence has the key that
    it would have in a run of one process.
    """
    process = distributed.process()
    prompts_P = process.index + process.count * np.arange(prompts)
    return (prompts_P[:, None] * samples + np.arange(samples)).reshape(-1)


def evaluation_keys(seed: int, name: str, problems: Sequence[int], samples: int) -> jax.Array:
    """One key a response of these problems of a data set, prompt-major.

    A function of the seed, the set's name, the problem's number and the sample's number alone: what a
    response becomes depends neither on where an evaluation was interrupted nor on how many samples it has.
    """
    key = jax.random.fold_in(jax.random.key(seed), EVAL_STREAM)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    numbers_B2 = np.stack(np.meshgrid(problems, range(samples), indexing="ij"), axis=-1).reshape(-1, 2)
    by_problem = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers_B2[:, 0]))
    return jax.vmap(jax.random.fold_in)(by_problem, jnp.asarray(numbers_B2[:, 1]))


def failures(trajectories: Trajectories, samples: int, ids: Sequence[str]) -> str | None:
    """A sentence about the responses that ended in logits that are not finite; None without any."""
    failed = np.flatnonzero(trajectories.nonfinite_B).tolist()
    found = sorted({ids[index // samples] for index in failed})
    if not found:
        return None
    named = rows.some(found, 5)
    return f"{len(failed)} responses ended in logits that are not finite, to the problems {named}"


def response_texts(tokenizer_info: TokenizerInfo, trajectories: Trajectories) -> list[str]:
    """The text of each response, as it is graded."""
    count = len(trajectories.lengths_B)
    return [prompts.response_text(tokenizer_info.tokenizer, trajectories.response(i)) for i in range(count)]
