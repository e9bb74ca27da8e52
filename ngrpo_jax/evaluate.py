"""The evaluation command: Mean@n and Pass@k of a checkpoint, or one prompt tried by hand.

    python -m ngrpo_jax.evaluate --config=configs/NAME.py --workdir=DIR [--step=N|best|latest|start]
    python -m ngrpo_jax.evaluate --config=... --workdir=... --prompt="What is 1+1?" --config.eval.mixing=true

`--step` is the best checkpoint by default, and the starting model where the workdir has none. Graded
responses go to WORKDIR/generations_STEP.jsonl.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from ngrpo_jax.analysis import passk
from ngrpo_jax.commands import commandline, composition, evaluation
from ngrpo_jax.commands.run import open_checkpoint
from ngrpo_jax.runtime import console, distributed, mesh, preflight
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.tasks import prompts
from ngrpo_jax.tasks.rewards import Grader


def main(argv: Sequence[str]) -> None:
    """Evaluates on `data.eval`, or writes responses to `--prompt`."""
    config, flags = commandline.parse_flags(argv, step="best", prompt=None)
    settings = resolve(config)
    workdir = pathlib.Path(flags["workdir"])
    distributed.require_alone("evaluate")
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    preflight.check_workdir(workdir)
    source = composition.open_source(settings, workdir)
    if flags["prompt"] is not None:
        step, params = open_checkpoint(source, workdir, devices, flags["step"])
        actor = make_actor(settings, source, devices, params)
        try_prompt(settings, actor, flags["prompt"], step)
        return
    held_out = composition.load_set(settings, source.language.tokenizer, "test")
    with Grader(settings.reward.workers, settings.reward.deadline_s, settings.reward.memory_mb) as grader:
        grader.check(settings.reward.kind)
        step, params = open_checkpoint(source, workdir, devices, flags["step"])
        actor = make_actor(settings, source, devices, params)
        evaluate(settings, workdir, actor, held_out, grader, step)


def make_actor(
    settings: Settings, source: composition.Source, devices: jax.sharding.Mesh, params: Any
) -> evaluation.Actor:
    """The checkpoint ready to write; a neighbour table only where evaluation mixes."""
    mixes = evaluation.evaluation_draws(settings).mixes
    table_VC = composition.build_table(params["embed"]["embedding"], source.language) if mixes else None
    return evaluation.make_actor(source, devices, params, table_VC)


def evaluate(
    settings: Settings,
    workdir: pathlib.Path,
    actor: evaluation.Actor,
    held_out: composition.ProblemSet,
    grader: Grader,
    step: int,
) -> None:
    """Writes and grades the responses, stores them, prints the table."""
    begun = time.monotonic()
    result = evaluation.evaluate_set(actor, held_out, settings, grader, label="evaluation")
    seconds = time.monotonic() - begun
    path = workdir / f"generations_{step}.jsonl"
    workdir.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, reward in enumerate(result.rewards_PN.reshape(-1)):
            problem = held_out.problems[index // settings.eval.samples]
            row = evaluation.sample_row(
                actor.language, problem, result.trajectories, index, reward, step=step
            )
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    figures, k = result.figures, settings.eval.pass_k
    best_at_k = passk.best_at_k_bootstrap(result.rewards_PN > 0.5, k)
    rows = [
        (f"Mean@{settings.eval.samples}", figures["mean_at_n"]),
        (f"Pass@{k}", figures["pass_at_k"]),
        (f"best@{k} (bootstrap, as the paper's tables)", best_at_k),
        ("truncated responses", figures["truncated"]),
        ("tokens a response", figures["length_mean"]),
    ]
    print(console.table(rows, (f"{settings.data.eval}, step {step}", "")))
    tokens = int(result.trajectories.lengths_B.sum())
    print(
        f"\n{len(held_out.problems)} problems ({held_out.dropped} left out as too long) × "
        f"{settings.eval.samples} samples in {console.format_seconds(seconds)} "
        f"({console.format_rate(tokens / seconds, 'tokens')})"
    )
    print(f"responses  {path}")


def try_prompt(settings: Settings, actor: evaluation.Actor, text: str, step: int) -> None:
    """Prints `eval.samples` responses to a prompt of the user's, mixed tokens marked."""
    tokenizer, data = actor.language.tokenizer, settings.data
    prompt = prompts.encode_prompt(tokenizer, prompts.user_text(text, data.prompt), data.chat_template)
    if len(prompt) > data.max_prompt_tokens:
        raise ValueError(
            f"--prompt has {len(prompt)} tokens, more than data.max_prompt_tokens = {data.max_prompt_tokens}."
        )
    draws = evaluation.evaluation_draws(settings)
    trajectories = evaluation.write_responses(
        actor, [prompt], settings, label="response", stream=evaluation.EVAL_STREAM, draws=draws
    )
    what = f"mixing on (rate {settings.mixing.rate}; mixed tokens ⟦so⟧)" if draws.mixes else "mixing off"
    print(f"step {step}, temperature {draws.temperature}, {what}")
    print(f"prompt: {tokenizer.decode(prompt)}")
    for index in range(draws.samples):
        tokens = trajectories.response(index)
        mixed = trajectories.mixed_BT[index, : len(tokens)]
        ended = "" if trajectories.stopped_B[index] else ", cut off at eval.max_new_tokens"
        print(f"\n--- response {index + 1} ({len(tokens)} tokens{ended})")
        print(prompts.marked_text(tokenizer, tokens, mixed))


if __name__ == "__main__":
    commandline.run_command(main)
