"""The loop of a run: steps, evaluations, checkpoints and logs until `train.steps`, then the summary.

Owns the schedule, and how a run stops early. Must not know what a step or an evaluation computes.
"""

import dataclasses
import pathlib
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from ngrpo_jax.errors import Preempted
from ngrpo_jax.evaluation.answering import evaluate_set
from ngrpo_jax.run import summary
from ngrpo_jax.run.neighbor_table import refresh_table
from ngrpo_jax.run.state import Run, RunState, save
from ngrpo_jax.run.step import policy_of, train_step
from ngrpo_jax.runtime import distributed, ending, metrics
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import TrainSettings
from ngrpo_jax.setup.policy import compile_rollouts, evaluation_request, training_request
from ngrpo_jax.tasks.rewards import Grader


def train(run: Run, state: RunState, grader: Grader, checkpoints: Checkpoints, begun: float) -> None:
    """Trains until `train.steps`, then evaluates, exports and sums up.

    Args:
      begun: `time.monotonic()` when the command began.

    Raises:
      Preempted: a process got a signal; the state is saved.
    """
    settings, process = run.settings, distributed.process()
    if process.primary:
        summary.announce(run, state)
    policy = policy_of(run, state.train_state.params, None)
    compile_rollouts(policy, [training_request(policy, settings), evaluation_request(policy, settings)])
    del policy  # a copy of the parameters
    if not state.initial_evaluation:
        before = evaluate(run, state, grader, "evaluation before")
        state = dataclasses.replace(state, initial_evaluation=before)
    began_at, clock = state.step, time.monotonic()
    after: dict[str, float] = {}
    with (
        metrics.RunLog(
            run.workdir,
            resume_step=state.step or None,
            loggers=settings.train.loggers,
            primary=process.primary,
        ) as log,
        ending.Signals() as signals,
    ):
        while state.step < settings.train.steps:
            with profiled(settings.train, state.step + 1, run.workdir):
                state, row, samples = train_step(run, state, grader)
            last = state.step == settings.train.steps
            # What a step's row holds depends on the schedule alone, not on whether this is the command's last
            # step: a resumed run then has the rows of one that never stopped.
            scheduled = settings.eval.every is not None and state.step % settings.eval.every == 0
            after = evaluate(run, state, grader, "evaluation") if scheduled else {}
            row |= {f"eval/{name}": value for name, value in after.items()}
            log.write(state.step, row, samples)
            stop = max(distributed.allgather("signals", signals.received))
            if last or scheduled or state.step % settings.checkpoint.every == 0 or stop:
                save(state, run, checkpoints, row if scheduled else None)
            pace = (time.monotonic() - clock) / (state.step - began_at)
            if process.primary:
                print(summary.step_line(state.step, row, settings.train.steps, pace), flush=True)
            if stop and not last:
                raise Preempted(stop, state.step)
    checkpoints.wait()
    after = after or evaluate(run, state, grader, "evaluation after")
    summary.finish(run, state, after, checkpoints, time.monotonic() - begun)


def evaluate(run: Run, state: RunState, grader: Grader, label: str) -> dict[str, float]:
    """Held-out metrics of the current parameters."""
    settings = run.settings
    table = refresh_table(run, state)[0] if settings.eval.mixing else None
    policy = policy_of(run, state.train_state.params, table)
    return evaluate_set(policy, run.held_out, settings, grader, label=label)


def profiled(settings: TrainSettings, step: int, workdir: pathlib.Path) -> AbstractContextManager[Any]:
    """Traces the block into WORKDIR/profile at the steps of `train.profile_from`: one trace a process."""
    first = settings.profile_from
    if first is None or not first <= step < first + settings.profile_steps:
        return nullcontext()
    return jax.profiler.trace(workdir / "profile" / f"step-{step}-process-{distributed.process().index}")
