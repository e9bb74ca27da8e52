"""What a training run prints before its first step, after each and at its end, and its summary.json.

Must not decide anything about the run.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ngrpo_jax import files
from ngrpo_jax.errors import require
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import fit, memory
from ngrpo_jax.run.state import Run, RunState
from ngrpo_jax.runtime import console, distributed, mesh, metrics, steps
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.model_spec import save_model
from ngrpo_jax.setup.resume import best_key
from ngrpo_jax.tasks import prompts

# What `print_summary` reads, besides the figures before and after.
SHOWN = (
    *("seconds", "mixed_fraction", "mix_cosine_mean", "mix_cosine_min", "zero_variance"),
    *("best_step", "best_metric", "best_value"),
)


def read_finished(workdir: pathlib.Path, steps: int) -> dict[str, Any] | None:
    """What summary.json holds, None where no run has reached `steps`; UserError where the file is damaged."""
    path = workdir / "summary.json"
    if not path.is_file():
        return None
    summary = files.read_json(path, "remove it, and the run goes on")
    steps_done = summary.get("steps")
    require(
        type(steps_done) is int and summary.keys() >= set(SHOWN),
        f"{path} is no summary of a run; remove it, and the run goes on.",
    )
    return summary if summary["steps"] >= steps else None


def how_to_go_on(workdir: pathlib.Path) -> str:
    """What a stopped run leaves in its workdir, and how to go on."""
    step = max(steps.on_disk(workdir / "checkpoints"), default=None)
    if step is not None:
        return f"the run in {workdir} goes on from step {step} when the same command is started again."
    if (workdir / "warm_start").is_dir():
        return f"no step was finished; {workdir}/warm_start stays, and the same command begins with step 1."
    return f"no step was finished, and nothing is in {workdir} yet; the same command begins anew."


def announce(run: Run, state: RunState) -> None:
    """Prints what this run is, before its first step."""
    process = distributed.process()
    settings, model_spec = run.settings, run.model_spec
    mixing = settings.mixing
    count = decoder.parameter_count(model_spec.config)
    size = f"{console.format_count(count)} parameters"
    print(f"model      {model_spec.directory} ({model_spec.config.architecture}, {size})")
    print(
        f"problems   {len(run.training.problems)} to train on ({run.training.dropped} too long), "
        f"{len(run.held_out.problems)} held out ({run.held_out.dropped} too long)"
    )
    if model_spec.config.lora is not None:
        print(f"adapters   {_adapters(model_spec.config)}")
    what = f"{mixing.strategy}, rate {mixing.rate}, k {mixing.k}" if mixing.active else "none (plain GRPO)"
    print(f"mixing     {what}")
    print(
        f"each step  {settings.rollout.prompts} prompts × {settings.rollout.group} responses, "
        f"{settings.rollout.prompts // settings.train.mini_batch_prompts} optimiser steps, "
        f"on {run.mesh.size} {mesh.device_of(run.mesh).platform} device(s)"
        + (f" of {process.count} processes" if process.several else "")
        + _repeats(len(run.training.problems), settings.rollout.prompts)
    )
    needed, phase = memory.peak(fit.training_memory(settings, model_spec.config, run.mesh))
    print(
        f"memory     about {console.format_bytes(needed)} on each device, by estimate (most in the {phase})"
    )
    print(f"stops at   {_stops(run)}")
    print(f"steps      {state.step} of {settings.train.steps} done; workdir {run.workdir}", flush=True)
    explain_steps()


def _repeats(problems: int, prompts: int) -> str:
    """How often a problem comes in one step, where there are fewer problems than prompts."""
    if problems >= prompts:
        return ""
    return f"\n           only {problems} problems: each comes about {prompts / problems:.3g} times a step"


def _adapters(config: ModelConfig) -> str:
    """What is trained where adapters are, and that neighbours do not change then."""
    assert config.lora is not None
    count = decoder.trained_count(config)
    share = 100 * count / decoder.parameter_count(config)
    matrices = f"rank {config.lora.rank} on {len(config.lora.targets)} matrices of each layer"
    return (
        f"{matrices}: {console.format_count(count)} trained parameters, {share:.2g} % of the model's;\n"
        "           the embedding stays as it is, so the neighbour table is built once for the whole run"
    )


def _stops(run: Run) -> str:
    """The tokens that end a response, and a warning where a turn of the chat template ends otherwise."""
    tokenizer, ids = run.model_spec.tokenizer_info.tokenizer, run.model_spec.tokenizer_info.stop_ids
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ids)
    end = prompts.turn_end(tokenizer, run.settings.data.chat_template)
    if end is None or end in ids:
        return shown
    name = tokenizer.convert_ids_to_tokens(end)
    return f"{shown}; warning: the chat template ends a turn by {name!r}, which data.stop={name} would add"


def step_line(step: int, row: dict[str, float], steps: int, pace: float) -> str:
    """The line of a step, at most 100 characters: what was learnt, its time, how long the rest takes.

    `pace`: seconds a step.
    """
    parts = [
        f"step {step}/{steps}",
        f"reward {row['reward/mean']:.3f}",
        f"length {row['rollout/length_mean']:.0f}",
        f"mixed {100 * row['rollout/mixed_fraction']:.1f} %",
        f"gap {row['gap/max']:.0e}",
        console.format_seconds(row["time/step"]),
    ]
    if "eval/mean_at_n" in row:
        parts.insert(2, f"held out {row['eval/mean_at_n']:.3f}")
    if step < steps:
        parts.append(f"{console.format_seconds(pace * (steps - step))} left")
    return " · ".join(parts)


def explain_steps() -> None:
    """Prints what the words of a step's line mean."""
    print(
        "           reward: mean of the training rollouts; held out: Mean@n; length: tokens a\n"
        "           response; mixed: share of response tokens fed back as a mixture; gap: largest\n"
        "           difference of log-probability between sampler and learner; then the step's time,\n"
        "           and what the rest takes at the mean pace so far. docs/metrics.md has more.",
        flush=True,
    )


def finish(
    run: Run, state: RunState, after: dict[str, float], checkpoints: Checkpoints, seconds: float
) -> None:
    """Exports the last parameters, writes summary.json and prints the table, all by the first process.

    The others wait for it: a process that ended would make jax abort all of them after five minutes.

    Args:
      after: held-out metrics of the last parameters.
      seconds: since the command began.
    """
    primary = distributed.process().primary
    with console.Progress("exporting the model", keep=False, enabled=primary):
        save_model(run.model_spec, state.train_state.params, run.workdir / "export")
    if primary:
        rows = metrics.read_rows(run.workdir / "metrics.jsonl")
        evaluated = run.workdir / "evaluations.jsonl"
        evaluations = metrics.read_rows(evaluated) if evaluated.exists() else []
        found = summarize(run, state, after, rows, checkpoints.best_step(), evaluations)
        summary = found | {"seconds": seconds}
        files.write_json(run.workdir / "summary.json", summary)
        print_summary(summary, run.settings, run.workdir)
    distributed.allgather("the run is summed up", None)


def summarize(
    run: Run,
    state: RunState,
    after: dict[str, float],
    rows: Sequence[dict[str, Any]],
    best_step: int | None,
    evaluations: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """A finished run in numbers and paths, but for its time: what summary.json holds.

    Args:
      rows: those of metrics.jsonl.
      best_step: the step of the best checkpoint, None where no step was evaluated.
      evaluations: rows of evaluations.jsonl; a run of an earlier version has none of its first part.
    """
    before, checkpoints = state.initial_evaluation, run.workdir / "checkpoints"
    mixed = [row for row in rows if "rollout/mix_cosine_mean" in row]
    scores = {row["step"]: row.get(best_key(run.settings)) for row in rows}
    scores |= {row["step"]: row[run.settings.checkpoint.best_metric] for row in evaluations}

    def mean(name: str, rows: Sequence[dict[str, Any]]) -> float | None:
        return float(np.mean([row[name] for row in rows])) if rows else None

    return {
        "mean_at_n_before": before["mean_at_n"],
        "mean_at_n_after": after["mean_at_n"],
        "pass_at_k_before": before["pass_at_k"],
        "pass_at_k_after": after["pass_at_k"],
        "length_before": before["length_mean"],
        "length_after": after["length_mean"],
        "steps": state.step,
        "best_step": best_step,
        "best_metric": run.settings.checkpoint.best_metric,
        "best_value": None if best_step is None else scores.get(best_step),
        "best_checkpoint": None if best_step is None else str(checkpoints / str(best_step)),
        "zero_variance": mean("groups/zero_variance", rows),
        "mixed_fraction": mean("rollout/mixed_fraction", rows),
        "mix_cosine_mean": mean("rollout/mix_cosine_mean", mixed),
        "mix_cosine_min": min((row["rollout/mix_cosine_min"] for row in mixed), default=None),
        "sampler_learner_gap_max": max(row["gap/max"] for row in rows),
        "checkpoint": str(checkpoints / str(state.step)),
        "export": str(run.workdir / "export"),
    }


def print_finished(summary: dict[str, Any], settings: Settings, workdir: pathlib.Path) -> None:
    """Prints that the workdir's run is finished, and its summary again."""
    print(f"{workdir} holds a finished run of {summary['steps']} steps; another --workdir starts a new one.")
    print_summary(summary, settings, workdir)


def print_summary(summary: dict[str, Any], settings: Settings, workdir: pathlib.Path) -> None:
    """Prints the table of a finished run: before and after, mixing, its directories, what to run next."""
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
    # Paths by the given workdir: summary.json has those of where the run was, and it may have moved.
    checkpoints = workdir / "checkpoints"
    print(f"latest     {checkpoints / str(summary['steps'])} (step {summary['steps']})")
    best = "none, since no step was evaluated"
    if summary["best_step"] is not None:
        best = f"{checkpoints / str(summary['best_step'])} (step {summary['best_step']}{_score(summary)})"
    print(f"best       {best}")
    kind = "a Hugging Face directory" if settings.lora.rank is None else "an adapter, in PEFT's format"
    print(f"export     {workdir / 'export'}  ({kind})")
    print(f"look       python -m ngrpo_jax.report --workdir={workdir}")


def _score(summary: dict[str, Any]) -> str:
    """What the best checkpoint is best at, beside the starting model where that was better."""
    metric, value = summary["best_metric"], summary["best_value"]
    if value is None:
        return ""
    start = summary.get(f"{metric}_before")  # of mean_at_n and pass_at_k
    below = start is not None and value < start
    return f", {metric} {value:.4g} held out" + (f"; below the starting model's {start:.4g}" if below else "")
