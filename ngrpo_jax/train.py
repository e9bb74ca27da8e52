"""The training command: the only place that knows the whole ring.

    python -m ngrpo_jax.train --config=configs/NAME.py --workdir=DIR [--config.a.b=value] [--preflight]

prompts -> rollout -> reward -> update -> next rollout, with an evaluation before, on a schedule, and after.
A workdir that holds a checkpoint is resumed from it; one that is finished says so. `--preflight` trains
nothing: it says whether this run could start here and would fit (commands/checklist.py).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from ngrpo_jax.commands import checklist, commandline, composition, fit, summary, table
from ngrpo_jax.commands.actor import (
    Actor,
    compile_ahead,
    evaluation_draws,
    failures,
    make_actor,
    response_texts,
    training_draws,
    write_responses,
)
from ngrpo_jax.commands.evaluation import evaluate_set
from ngrpo_jax.commands.figures import gather_outcome, rollout_figures, sample_rows, step_row
from ngrpo_jax.commands.run import Position, Run, best_key, old_logprobs, prepare, save
from ngrpo_jax.learner import credit, packing, update
from ngrpo_jax.model import hf
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import console, distributed, ending, files, mesh, metrics
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import TrainSettings, resolve
from ngrpo_jax.tasks.datasets import Problem
from ngrpo_jax.tasks.rewards import Counts, Grader


def main(argv: Sequence[str]) -> None:
    """Parses flags, checks everything, trains."""
    config, flags = commandline.parse_flags(argv, preflight=False)
    workdir = pathlib.Path(flags["workdir"])
    if flags["preflight"]:
        raise SystemExit(checklist.run(config, workdir))
    settings = resolve(config)
    here = distributed.initialize()
    fit.check_hosts(settings, here.count)
    distributed.check_shared(workdir)
    finished = summary.already_finished(settings, workdir)
    if any(distributed.exchange("finished", finished)):  # shared storage may show it to some before others
        return
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    hf.check_replaceable(workdir / "export")
    begun = time.monotonic()
    with Grader(settings.reward.workers, settings.reward.deadline_s, settings.reward.memory_mb) as grader:
        grader.check(settings.reward.kind)
        source, training, held_out = composition.compose(settings, workdir, devices)
        params = composition.load_params(source, devices)
        facts = composition.fingerprint(source, params)
        with Checkpoints(workdir / "checkpoints", model=facts, best=best_key(settings)) as checkpoints:
            parts = (source, training, held_out)
            run, position = prepare(settings, workdir, parts, devices, params, checkpoints)
            del params  # donated
            workdir.mkdir(parents=True, exist_ok=True)
            if here.primary:
                files.write_json(workdir / "config.json", config.to_dict())
            with commandline.last_words():
                train(run, position, grader, checkpoints, begun)


def train(run: Run, position: Position, grader: Grader, checkpoints: Checkpoints, begun: float) -> None:
    """Steps until `train.steps`, then evaluates, exports and sums up."""
    settings, here = run.settings, distributed.place()
    resume = position.step or None
    summary.announce(run, position)
    compile_rollouts(run, position)
    if not position.before:
        position = dataclasses.replace(position, before=evaluate(run, position, grader, "evaluation before"))
    began_at, clock = position.step, time.monotonic()
    after: dict[str, float] = {}
    with (
        metrics.MetricsWriter(run.workdir, resume_step=resume, primary=here.primary) as writer,
        metrics.JsonLines(run.workdir / "samples.jsonl", resume_step=resume, primary=here.primary) as samples,
        ending.Signals() as signals,
    ):
        while position.step < settings.train.steps:
            with profiled(settings.train, position.step + 1, run.workdir):
                position, row, rows = train_step(run, position, grader)
            last = position.step == settings.train.steps
            # Only the schedule decides what a step's row holds, so that a run that stopped here and was
            # resumed has the rows of one that never stopped.
            scheduled = settings.eval.every is not None and position.step % settings.eval.every == 0
            after = evaluate(run, position, grader, "evaluation") if scheduled else {}
            row |= {f"eval/{name}": value for name, value in after.items()}
            writer.write(position.step, row)
            samples.write(rows)
            stop = max(distributed.exchange("signals", signals.received))
            if last or scheduled or position.step % settings.checkpoint.every == 0 or stop:
                save(position, settings, checkpoints, row if scheduled else None)
            pace = (time.monotonic() - clock) / (position.step - began_at)
            if here.primary:
                print(summary.step_line(position.step, row, settings.train.steps, pace), flush=True)
            if stop and not last:
                raise commandline.Stopped(stop, position.step)
    checkpoints.wait()
    after = after or evaluate(run, position, grader, "evaluation after")
    summary.finish(run, position, after, checkpoints, time.monotonic() - begun)


def compile_rollouts(run: Run, position: Position) -> None:
    """Compiles the rollouts of training and evaluation for all sizes, and says how long it took."""
    settings = run.settings
    actor = actor_of(run, position, None)
    draws = (training_draws(settings), evaluation_draws(settings))
    seconds = sum(compile_ahead(actor, settings, one) for one in draws)
    if distributed.place().primary:
        print(f"rollouts   compiled for every size in {console.format_seconds(seconds)}", flush=True)


def train_step(
    run: Run, position: Position, grader: Grader
) -> tuple[Position, dict[str, float], list[dict[str, Any]]]:
    """Once round the ring. Returns the next position, the step's metrics, and a few responses to look at."""
    seconds: dict[str, float] = {}
    step, problems = position.step + 1, next(position.stream)
    prompts = [run.prompt_of[problem.id] for problem in problems]

    with _timed(seconds, "table"):
        served = table.serve(run, position)
    actor, trajectories = roll_out(run, position, served, problems, prompts, seconds)
    rewards_PG, graded = grade(run, grader, problems, trajectories, seconds)
    outcome = gather_outcome(trajectories, rewards_PG)
    figures = rollout_figures(actor, trajectories, outcome)
    del actor  # the rollout's copy of the parameters must not outlive the rollout

    before_VD = table.before_update(run, served, position.state.params)
    state, learned = learn(run, position.state, prompts, trajectories, rewards_PG, seconds)
    if not np.isfinite(learned["learner/grad_norm"]):
        raise _not_finite(run, f"the gradient of step {step} is not finite")
    with _timed(seconds, "table"):
        followed = table.after_update(run, served, before_VD, state.params)

    figures |= learned | ({} if served is None else served.figures)
    row = step_row(run, prompts, trajectories, outcome, graded, figures, seconds)
    samples = sample_rows(run.source.language, problems, trajectories, rewards_PG, step=step)
    age = 0 if served is None else served.age
    return Position(step, state, followed, age, position.stream, position.before), row, samples


def roll_out(
    run: Run,
    position: Position,
    served: table.Serving | None,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    seconds: dict[str, float],
) -> tuple[Actor, Trajectories]:
    """Responses to this host's problems, and who wrote them; all hosts stop where one's cannot be used."""
    step = position.step + 1
    with _timed(seconds, "rollout"):
        actor = actor_of(run, position, served)
        trajectories = write_responses(
            actor,
            prompts,
            run.settings,
            label=f"step {step}: rollout",
            stream=step,
            draws=training_draws(run.settings),
        )
    own = failures(trajectories, run.settings.rollout.group, [problem.id for problem in problems])
    sentence = "; ".join(filter(None, distributed.exchange("failures", own)))
    if sentence:
        raise _not_finite(run, f"step {step}: {sentence}")
    return actor, trajectories


def grade(
    run: Run,
    grader: Grader,
    problems: Sequence[Problem],
    trajectories: Trajectories,
    seconds: dict[str, float],
) -> tuple[np.ndarray, Counts]:
    """The rewards of this host's responses, float32 [P, G], and what the grader did for them."""
    group = run.settings.rollout.group
    with _timed(seconds, "reward"):
        texts = response_texts(run.source.language, trajectories)
        golds = [problem.answer for problem in problems for _ in range(group)]
        before = grader.snapshot()
        rewards_B = np.asarray(grader.score(texts, golds, run.settings.reward.kind), np.float32)
        graded = grader.snapshot().since(before)
    return rewards_B.reshape(len(problems), group), graded


def _not_finite(run: Run, found: str) -> FloatingPointError:
    """The end of a run whose numbers are no longer finite: what was found, and how to go on."""
    return FloatingPointError(
        f"{found}; the run in {run.workdir} goes on from its last checkpoint, with a lower "
        "optimizer.learning_rate in a new --workdir if it happens again"
    )


def learn(
    run: Run,
    state: update.TrainState,
    prompts: Sequence[Sequence[int]],
    trajectories: Trajectories,
    rewards_PG: np.ndarray,
    seconds: dict[str, float],
) -> tuple[update.TrainState, dict[str, float]]:
    """Advantages, packed rows, old and reference log-probabilities, one optimiser step a mini-batch.

    Groups, and so advantages, are whole on their host; what is a mean over the step is one over all hosts.
    """
    settings, hosts = run.settings, distributed.place().count
    gather = functools.partial(distributed.exchange, "learning")
    earned = credit.assign(rewards_PG, trajectories, settings.objective, settings.rollout.max_new_tokens)
    batches = packing.mini_batches(
        [prompt for prompt in prompts for _ in range(settings.rollout.group)],
        trajectories,
        earned.advantages_PG.reshape(-1),
        settings.objective,
        count=settings.mini_batches,
        row_tokens=settings.row_tokens,
        rows=settings.train.rows_per_device * settings.mesh.data * settings.mesh.fsdp // hosts,
        max_new_tokens=settings.rollout.max_new_tokens,
        counted_B=earned.counted_PG.reshape(-1),
        share_prompts=settings.train.share_prompts,
        gather=gather,
    )
    old = old_logprobs(settings)
    with _timed(seconds, "logprobs"):
        scored = update.score(run.programs, state.params, run.reference, batches, old=old)
        jax.block_until_ready(scored)
    with _timed(seconds, "update"):
        state, steps = update.update(run.programs, state, scored)
        figures = update.figures(jax.device_get(steps), gap_of_first=old == "sampler")
    figures |= credit.join_figures(gather(earned.figures))
    return state, {**figures, "rows/fill": packing.fill(batches, gather)}


def actor_of(run: Run, position: Position, served: table.Serving | None) -> Actor:
    """Today's parameters ready to write, mixing by the table that serves."""
    table_VC = None if served is None else served.table_VC
    return make_actor(run.source, run.mesh, position.state.params, table_VC, run.settings.rollout.layout)


def evaluate(run: Run, position: Position, grader: Grader, label: str) -> dict[str, float]:
    """Held-out figures of the current parameters."""
    settings = run.settings
    served = table.serve(run, position) if settings.eval.mixing else None
    return evaluate_set(actor_of(run, position, served), run.held_out, settings, grader, label=label)


@contextmanager
def profiled(settings: TrainSettings, step: int, workdir: pathlib.Path) -> Iterator[None]:
    """Traces the step into WORKDIR/profile where the settings ask for it: one trace a step and process."""
    first = settings.profile_from
    if first is None or not first <= step < first + settings.profile_steps:
        yield
        return
    with jax.profiler.trace(workdir / "profile" / f"step-{step}-process-{distributed.place().index}"):
        yield


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds to a phase's wall time in seconds; results must be on the host by its end."""
    start = time.monotonic()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start


if __name__ == "__main__":
    commandline.run_command(main)
