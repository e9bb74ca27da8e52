"""What a training run says: before it starts, at each step, and at its end (summary.json and the table)."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np

from ngrpo_jax.errors import UserError
from ngrpo_jax.model import decoder, hf
from ngrpo_jax.preflight import fit, memory
from ngrpo_jax.run.state import Run, RunState
from ngrpo_jax.runtime import console, distributed, files, mesh, metrics
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.resume import best_key


def already_finished(settings: Settings, workdir: pathlib.Path) -> bool:
    """Whether the workdir's run has reached `train.steps`; if so, prints its summary again."""
    path = workdir / "summary.json"
    if not path.is_file():
        return False
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); remove it, and the run goes on.") from error
    if summary["steps"] < settings.train.steps:
        return False
    if distributed.process().primary:
        print(
            f"{workdir} holds a finished run of {summary['steps']} steps; another --workdir starts a new one."
        )
        print_summary(summary, settings, workdir)
    return True


def announce(run: Run, state: RunState) -> None:
    """What this run is, before it starts; said by the first process."""
    process = distributed.process()
    if not process.primary:
        return
    settings, model_spec = run.settings, run.model_spec
    mixing = settings.mixing
    count = decoder.parameter_count(model_spec.config)
    size = f"{console.format_count(count)} parameters"
    print(f"model      {model_spec.directory} ({model_spec.config.architecture}, {size})")
    print(
        f"problems   {len(run.training.problems)} to train on ({run.training.dropped} too long), "
        f"{len(run.held_out.problems)} held out ({run.held_out.dropped} too long)"
    )
    what = f"{mixing.strategy}, rate {mixing.rate}, k {mixing.k}" if mixing.active else "none (plain GRPO)"
    print(f"mixing     {what}")
    print(
        f"each step  {settings.rollout.prompts} prompts × {settings.rollout.group} responses, "
        f"{settings.rollout.prompts // settings.train.mini_batch_prompts} optimiser steps, "
        f"on {run.mesh.size} {jax.devices()[0].platform} device(s)"
        + (f" of {process.count} processes" if process.several else "")
    )
    needed, phase = memory.peak(fit.training_memory(settings, model_spec.config))
    print(
        f"memory     about {console.format_bytes(needed)} on each device, by estimate (most in the {phase})"
    )
    print(f"steps      {state.step} of {settings.train.steps} done; workdir {run.workdir}", flush=True)


def step_line(step: int, row: dict[str, float], steps: int, pace: float) -> str:
    """One line a step: what was learnt, what it cost, how long it still takes (`pace`: seconds a step)."""
    parts = [
        f"step {step}/{steps}",
        f"reward {row['reward/mean']:.3f}",
        f"length {row['rollout/length_mean']:.0f}",
        f"mixed {100 * row['rollout/mixed_fraction']:.1f} %",
        f"gap {row['gap/max']:.1e}",
        f"{console.format_seconds(row['time/step'])} (rollout {console.format_seconds(row['time/rollout'])}, "
        f"update {console.format_seconds(row['time/logprobs'] + row['time/update'])})",
    ]
    if "table/cost" in row:
        parts.append(f"table at {100 * row['table/cost']:.1f} % of a build")
    if "eval/mean_at_n" in row:
        parts.insert(2, f"held out {row['eval/mean_at_n']:.3f}")
    if step < steps:
        parts.append(f"{console.format_seconds(pace * (steps - step))} left")
    return " · ".join(parts)


def finish(
    run: Run, state: RunState, after: dict[str, float], checkpoints: Checkpoints, seconds: float
) -> None:
    """Exports the last parameters, writes summary.json, prints the table: the first process alone.

    The others wait for it: a process that left would have jax abort all of them after five minutes.
    """
    params = jax.tree.map(mesh.to_host, state.train_state.params)
    if distributed.process().primary:
        _write(run, state, params, after, checkpoints, seconds)
    distributed.allgather("the run is summed up", None)


def _write(
    run: Run,
    state: RunState,
    params: Any,
    after: dict[str, float],
    checkpoints: Checkpoints,
    seconds: float,
) -> None:
    settings, model_spec = run.settings, run.model_spec
    export = run.workdir / "export"
    hf.save(
        export, model_spec.config, params, tokenizer_from=model_spec.directory, dtype=model_spec.config.dtype
    )
    rows = metrics.read_rows(run.workdir / "metrics.jsonl")
    mixed = [row for row in rows if "rollout/mix_cosine_mean" in row]
    best = checkpoints.best_step()
    scores = {row["step"]: row.get(best_key(settings)) for row in rows}
    summary = {
        "mean_at_n_before": state.initial_evaluation["mean_at_n"],
        "mean_at_n_after": after["mean_at_n"],
        "pass_at_k_before": state.initial_evaluation["pass_at_k"],
        "pass_at_k_after": after["pass_at_k"],
        "length_before": state.initial_evaluation["length_mean"],
        "length_after": after["length_mean"],
        "seconds": seconds,
        "steps": state.step,
        "best_step": best,
        "best_metric": settings.checkpoint.best_metric,
        "best_value": None if best is None else scores.get(best),
        "best_checkpoint": None if best is None else str(run.workdir / "checkpoints" / str(best)),
        "zero_variance": float(np.mean([row["groups/zero_variance"] for row in rows])),
        "mixed_fraction": float(np.mean([row["rollout/mixed_fraction"] for row in rows])),
        "mix_cosine_mean": float(np.mean([row["rollout/mix_cosine_mean"] for row in mixed]))
        if mixed
        else None,
        "mix_cosine_min": min((row["rollout/mix_cosine_min"] for row in mixed), default=None),
        "sampler_learner_gap_max": max(row["gap/max"] for row in rows),
        "checkpoint": str(run.workdir / "checkpoints" / str(state.step)),
        "export": str(export),
    }
    files.write_json(run.workdir / "summary.json", summary)
    print_summary(summary, settings, run.workdir)


def print_summary(summary: dict[str, Any], settings: Settings, workdir: pathlib.Path) -> None:
    """The table that ends a run: before and after, mixing, where things are, what to run next."""
    rows: list[tuple[str, float | None, float | None]] = [
        (f"Mean@{settings.eval.samples}", summary["mean_at_n_before"], summary["mean_at_n_after"]),
        (f"Pass@{settings.eval.largest_k}", summary["pass_at_k_before"], summary["pass_at_k_after"]),
        ("response tokens", summary["length_before"], summary["length_after"]),
    ]
    print()
    print(console.table(rows, ("held out", "before", "after")))
    print()
    if summary["mix_cosine_mean"] is not None:
        print(
            f"mixed      {100 * summary['mixed_fraction']:.1f} % of response tokens; cosine of mixed inputs "
            f"to their anchors: mean {summary['mix_cosine_mean']:.4f}, min {summary['mix_cosine_min']:.4f}"
        )
    print(f"groups     {100 * summary['zero_variance']:.1f} % without variance (all responses graded alike)")
    print(f"time       {console.format_seconds(summary['seconds'])} for {summary['steps']} steps")
    print(f"latest     {summary['checkpoint']} (step {summary['steps']})")
    best = "none, for no step was evaluated on the way"
    if summary["best_step"] is not None:
        value = summary["best_value"]
        scored = "" if value is None else f", {summary['best_metric']} {value:.4g} held out"
        best = f"{summary['best_checkpoint']} (step {summary['best_step']}{scored})"
    print(f"best       {best}")
    print(f"export     {summary['export']}  (a Hugging Face directory)")
    print(f"look       python -m ngrpo_jax.report --workdir={workdir}")
