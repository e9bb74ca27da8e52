"""The evaluation command: Mean@n, Pass@k and the rest of a checkpoint, or one prompt tried by hand.

    python -m ngrpo_jax.evaluate --config=configs/NAME.py --workdir=DIR [--step=N|best|latest|start]
        [--sets="tfds:aime25; tfds:gpqa_diamond prompt=choice reward=choice"] [--generations=DIR]
    python -m ngrpo_jax.evaluate --config=... --workdir=... --prompt="What is 1+1?" --config.eval.mixing=true
    python -m ngrpo_jax.evaluate --from FILE|DIR ... [--pass_k=1,8] [--regrade]
    python -m ngrpo_jax.evaluate --compare RUN_A RUN_B

`--step` is the best checkpoint by default, and the starting model where the workdir has none. Graded
responses go to generations_STEP_SET.jsonl in the workdir, or in --generations; an evaluation that was
interrupted goes on there. docs/evaluation.md has the rest.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ngrpo_jax import flags
from ngrpo_jax.errors import UserError
from ngrpo_jax.evaluation import stored
from ngrpo_jax.evaluation.answering import answer_problems
from ngrpo_jax.evaluation.cosines import mixed_cosines
from ngrpo_jax.evaluation.generations import Store, blocks, file_of, make_header, rows_of
from ngrpo_jax.evaluation.sets import EvalSet, eval_sets, split
from ngrpo_jax.preflight import capacity, fit, memory
from ngrpo_jax.rollout.request import RolloutRequest
from ngrpo_jax.runtime import console, distributed, mesh
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.model_spec import ModelSpec, model_identity, open_checkpoint, open_model_spec
from ngrpo_jax.setup.neighbor_table import build_table
from ngrpo_jax.setup.policy import (
    EVAL_STREAM,
    Policy,
    compile_rollouts,
    evaluation_mixes,
    evaluation_request,
    make_policy,
    sequence_keys,
    write_responses,
)
from ngrpo_jax.setup.problems import ProblemSet, load_set
from ngrpo_jax.setup.resume import best_key
from ngrpo_jax.tasks import prompts
from ngrpo_jax.tasks.rewards import Grader

# Sequences of a block for each slot: at a block's end slots stand idle, at an interruption a block is lost.
BLOCK_OF_SLOTS = 8


def main(argv: Sequence[str]) -> None:
    """Evaluates on `eval.sets` or `data.eval`, reads what is stored, or writes responses to `--prompt`."""
    if stored.wanted(argv):
        stored.main(argv)
        return
    config, options = flags.parse_flags(argv, step="best", prompt=None, sets=None, generations=None)
    if options["sets"] is not None:
        config.eval.sets = split(options["sets"])
    settings = resolve(config)
    workdir = pathlib.Path(options["workdir"])
    distributed.require_alone("evaluate")
    folder = pathlib.Path(options["generations"] or workdir)
    sets = eval_sets(settings)
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    capacity.check_workdir(workdir)
    capacity.check_workdir(folder)
    model_spec = open_model_spec(settings, workdir)
    for one in sets:
        fit.check_evaluation(one.settings, model_spec.config)
    if options["prompt"] is not None:
        step, params = open_checkpoint(model_spec, workdir, devices, options["step"], best_key(settings))
        policy = policy_of(settings, model_spec, devices, params)
        try_prompt(settings, policy, options["prompt"], step)
        return
    held_out = [load_set(one.settings, model_spec.tokenizer_info.tokenizer, "test") for one in sets]
    with Grader(settings.reward.workers, settings.reward.deadline_s, settings.reward.memory_mb) as grader:
        for one in sets:
            grader.check(one.settings.reward.kind)
        step, params = open_checkpoint(model_spec, workdir, devices, options["step"], best_key(settings))
        facts = model_identity(model_spec, params)
        stores = [
            Store(file_of(folder, step, one.name), make_header(one, problems, step, facts))
            for one, problems in zip(sets, held_out, strict=True)
        ]
        policy = policy_of(settings, model_spec, devices, params)
        announce(settings, model_spec, sets, held_out, stores)
        compile_rollouts(policy, requests_left(policy, sets, held_out, stores))
        for one, problems, store in zip(sets, held_out, stores, strict=True):
            complete(policy, one, problems, grader, store)
    stored.show([store.path for store in stores], None, regrade=False)


def policy_of(settings: Settings, model_spec: ModelSpec, devices: jax.sharding.Mesh, params: Any) -> Policy:
    """The checkpoint ready to write; a neighbour table only where evaluation mixes."""
    table_VC = build_table(params, model_spec, devices) if evaluation_mixes(settings) else None
    return make_policy(model_spec, devices, params, table_VC, settings.rollout.layout)


def announce(
    settings: Settings,
    model_spec: ModelSpec,
    sets: Sequence[EvalSet],
    held_out: Sequence[ProblemSet],
    stores: Sequence[Store],
) -> None:
    """What will be evaluated, before it is."""
    estimates = [memory.evaluation_estimate(one.settings, model_spec.config) for one in sets]
    needed = console.format_bytes(max(memory.peak(estimate)[0] for estimate in estimates))
    print(f"model      {model_spec.directory} ({model_spec.config.architecture})")
    print(f"memory     about {needed} on each device, by estimate")
    for one, problems, store in zip(sets, held_out, stores, strict=True):
        there = f", {store.done} of them done already" if store.done else ""
        print(
            f"set        {one.name}: {len(problems.problems)} problems × {one.settings.eval.samples} samples"
            f"{there} ({problems.dropped} left out as too long)",
            flush=True,
        )
    if evaluation_mixes(settings):
        print(f"mixing     on, rate {settings.mixing.rate}")


def requests_left(
    policy: Policy, sets: Sequence[EvalSet], held_out: Sequence[ProblemSet], stores: Sequence[Store]
) -> list[RolloutRequest]:
    """The different requests of the sets that are not complete yet."""
    requests = [
        evaluation_request(policy, one.settings)
        for one, problems, store in zip(sets, held_out, stores, strict=True)
        if store.done < len(problems.problems)
    ]
    return list(dict.fromkeys(requests))


def complete(policy: Policy, one: EvalSet, problems: ProblemSet, grader: Grader, store: Store) -> None:
    """Writes, grades and stores the responses that the store lacks, block by block."""
    settings, samples, count = one.settings, one.settings.eval.samples, len(problems.problems)
    begun, tokens, done_before, graded_before = time.monotonic(), 0, store.done, grader.snapshot()
    size = max(1, BLOCK_OF_SLOTS * settings.rollout.slots // samples)
    mixes = evaluation_mixes(settings)
    line = console.Progress(one.name, count * samples, "sequences", start=done_before * samples, keep=False)
    with line as progress:
        for numbers in blocks(done_before, count, size):
            answered = answer_problems(
                policy,
                problems,
                numbers,
                settings,
                grader,
                name=one.name,
                progress=progress,
                done_before=numbers.start * samples,
            )
            cosines = mixed_cosines(policy, answered.trajectories) if mixes else None
            store.append(rows_of(answered, problems, numbers, settings.reward.kind, cosines))
            tokens += int(answered.trajectories.lengths_B.sum())
    seconds = time.monotonic() - begun
    graded = grader.snapshot().since(graded_before)
    if tokens:
        without = graded.timeouts + graded.failures
        print(
            f"{one.name}: {count - done_before} problems × {samples} samples in "
            f"{console.format_seconds(seconds)} ({console.format_rate(tokens / seconds, 'tokens')}); "
            f"graded at {console.format_rate(graded.per_second, 'verdicts')}, {without} without a verdict",
            flush=True,
        )


def try_prompt(settings: Settings, policy: Policy, text: str, step: int) -> None:
    """Prints `eval.samples` responses to a prompt of the user's, mixed tokens marked."""
    tokenizer, data = policy.tokenizer_info.tokenizer, settings.data
    prompt = prompts.encode_prompt(tokenizer, prompts.user_text(text, data.prompt), data.chat_template)
    if len(prompt) > data.max_prompt_tokens:
        raise UserError(
            f"--prompt has {len(prompt)} tokens, more than data.max_prompt_tokens = {data.max_prompt_tokens}."
        )
    request = evaluation_request(policy, settings)
    keys_B = sequence_keys(settings.seed, EVAL_STREAM, np.arange(request.samples))
    with console.Progress("response", request.samples, "sequences", keep=False) as progress:
        trajectories = write_responses(policy, request, [prompt], keys_B, progress=progress)
    mixes = f"mixing on (rate {settings.mixing.rate}; mixed tokens ⟦so⟧)"
    what = mixes if evaluation_mixes(settings) else "mixing off"
    print(f"step {step}, temperature {request.sampling.temperature}, {what}")
    print(f"prompt: {tokenizer.decode(prompt)}")
    for index in range(request.samples):
        tokens = trajectories.response(index)
        mixed = trajectories.mixed_BT[index, : len(tokens)]
        ended = "" if trajectories.stopped_B[index] else ", cut off at eval.max_new_tokens"
        print(f"\n--- response {index + 1} ({len(tokens)} tokens{ended})")
        print(prompts.marked_text(tokenizer, tokens, mixed))


if __name__ == "__main__":
    flags.run_command(main)
