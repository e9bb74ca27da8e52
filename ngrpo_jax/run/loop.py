"""The loop of a run: steps, evaluations, checkpoints and logs until `train.steps`, then the summary.

Owns the schedule, and how a run stops early. Must not know what a step or an evaluation computes.
"""

import dataclasses
import functools
import math
import pathlib
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax

from ngrpo_jax.errors import Preempted
from ngrpo_jax.evaluation.answering import evaluate_set
from ngrpo_jax.run import summary
from ngrpo_jax.run.neighbor_table import refresh_table
from ngrpo_jax.run.state import Run, RunState, save
from ngrpo_jax.run.step import policy_of, train_step
from ngrpo_jax.runtime import console, distributed, ending, metrics
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.runtime.lock import Lock
from ngrpo_jax.settings import TrainSettings
from ngrpo_jax.setup.policy import compile_rollouts, evaluation_request, training_request
from ngrpo_jax.tasks.rewards import Grader


def train(
    run: Run, state: RunState, grader: Grader, checkpoints: Checkpoints, lock: Lock | None, begun: float
) -> None:
    """Trains until `train.steps`, then evaluates, exports and sums up.

    Args:
      lock: of the workdir, looked at after every step; None in the processes that do not hold it.
      begun: `time.monotonic()` when the command began.

    Raises:
      Preempted: a process got a signal; the state is saved.
    """
    settings, process = run.settings, distributed.process()
    if process.primary:
        summary.announce(run, state)
    # Evaluations are of the parameters as they are.
    requests = {settings.rollout.quantize: [training_request]}
    requests.setdefault(None, []).append(evaluation_request)
    for quantize, requests_of in requests.items():
        policy = policy_of(run, state.train_state.params, None, quantize)
        compile_rollouts(policy, [request_of(policy, settings) for request_of in requests_of])
        del policy  # a copy of the parameters
    before: HeldOut | None = None
    if not state.initial_evaluation:
        before = evaluate(run, state, grader, "evaluation before")
        before.row["problems"] = {one.id: one.problem[:SHOWN] for one in run.held_out.problems}
        state = dataclasses.replace(state, initial_evaluation=before.metrics)
    written = state.step if state.unfinished is None else state.step - 1  # rows of metrics.jsonl
    log = metrics.RunLog(
        run.workdir,
        resume_step=written or None,
        loggers=settings.loggers,
        primary=process.primary,
    )
    with log:
        if before is not None:
            log.write_evaluation(state.step, before.row, before.logged)
        state, after = take_steps(run, state, grader, checkpoints, log, lock)
        if after is None:
            after = evaluate(run, state, grader, "evaluation after")
            log.write_evaluation(state.step, after.row, after.logged)
    checkpoints.wait()
    summary.finish(run, state, after.metrics, checkpoints, time.monotonic() - begun)


def take_steps(
    run: Run,
    state: RunState,
    grader: Grader,
    checkpoints: Checkpoints,
    log: metrics.RunLog,
    lock: Lock | None,
) -> tuple[RunState, "HeldOut | None"]:
    """The state after `train.steps`, and the evaluation of the last step; None where no step was left."""
    settings, steps = run.settings, run.settings.train.steps
    began_at, clock = state.step, time.monotonic()
    seconds = {"step": math.inf, "evaluation": math.inf}  # of the one before
    after: HeldOut | None = None
    bad = 0  # steps in a row with an update that was skipped
    again = state.unfinished is not None  # its checkpoint was made without its evaluation
    with ending.Deferred(
        settings.checkpoint.grace_s, lambda: not state.step or checkpoints.holds(state.step)
    ) as signals:
        while state.step < steps or state.unfinished is not None:
            try:
                if state.unfinished is None:
                    trace = profiled(settings.train, state.step + 1, run.workdir)
                    with signals.expected("step", seconds), trace:
                        state, row, samples = train_step(run, state, grader)
                else:
                    row, samples = state.unfinished
                # What a step's row holds depends on the schedule alone, not on whether this is the command's
                # last step: a resumed run then has the rows of one that never stopped.
                scheduled = settings.eval.every is not None and state.step % settings.eval.every == 0
                last, after = state.step == steps, None
                if scheduled or last:
                    state = dataclasses.replace(state, unfinished=(metrics.scalars(row), samples))
                    with signals.expected("evaluation", seconds):
                        after = evaluate(run, state, grader, "evaluation")
                    state = dataclasses.replace(state, unfinished=None)
            except ending.Abandoned:
                if state.step and not checkpoints.holds(state.step):
                    save(state, run, checkpoints, None)
                raise stopped(run, checkpoints, signals.received) from None
            if lock is not None:
                lock.check()
            found = {} if after is None else after.logged
            log.write(state.step, row | (found if scheduled else {}), samples)
            if after is not None:
                log.write_evaluation(state.step, after.row, {} if scheduled else found)
            bad = bad + 1 if row["learner/skipped"] else 0
            if bad == settings.train.max_bad_steps:
                raise not_finite(run, bad, state.step)
            stop = max(distributed.allgather("signals", signals.received))
            if last or scheduled or state.step % settings.checkpoint.every == 0 or stop:
                save_state = functools.partial(save, state, run, checkpoints, found or None)
                if again:
                    checkpoints.replace(state.step, save_state)
                else:
                    save_state()
            again = False
            if distributed.process().primary:
                pace = (time.monotonic() - clock) / max(state.step - began_at, 1)
                console.say(summary.step_line(state.step, row | found, steps, pace))
            if stop:
                raise stopped(run, checkpoints, stop)
    return state, after


def not_finite(run: Run, bad: int, step: int) -> FloatingPointError:
    """The end of a run whose numbers are no longer finite."""
    return FloatingPointError(
        f"the loss or the gradient was not finite in {bad} steps in a row, the last of them {step}; the run "
        f"in {run.workdir} goes on from its last checkpoint, with a lower optimizer.learning_rate in a new "
        "--workdir if it happens again"
    )


def stopped(run: Run, checkpoints: Checkpoints, number: int) -> Preempted:
    """The end of a run by a signal, once what was saved is on disk."""
    checkpoints.wait()
    return Preempted(number, summary.how_to_go_on(run.workdir))


SHOWN = 300  # characters of a held-out problem in the first row of evaluations.jsonl


class HeldOut(NamedTuple):
    """An evaluation of a run: metrics by name, and its row of evaluations.jsonl without the step."""

    metrics: dict[str, float]
    row: dict[str, Any]

    @property
    def logged(self) -> dict[str, float]:
        """The metrics by their names in metrics.jsonl."""
        return {f"eval/{name}": value for name, value in self.metrics.items()}


def evaluate(run: Run, state: RunState, grader: Grader, label: str) -> HeldOut:
    """The current parameters on held-out problems: metrics, 95 % intervals, correct responses of each."""
    settings = run.settings
    table = refresh_table(run, state)[0] if settings.eval.mixing else None
    policy = policy_of(run, state.train_state.params, table)
    estimates, correct = evaluate_set(policy, run.held_out, settings, grader, label=label)
    metrics = {name: estimate.value for name, estimate in estimates.items()}
    intervals = {name: [e.low, e.high] for name, e in estimates.items() if e.low is not None}
    solved = {problem.id: n for problem, n in zip(run.held_out.problems, correct, strict=True)}
    return HeldOut(
        metrics, {**metrics, "intervals": intervals, "samples": settings.eval.samples, "correct": solved}
    )


def profiled(settings: TrainSettings, step: int, workdir: pathlib.Path) -> AbstractContextManager[Any]:
    """Traces the block into WORKDIR/profile at the steps of `train.profile_from`: one trace a process."""
    first = settings.profile_from
    if first is None or not first <= step < first + settings.profile_steps:
        return nullcontext()
    return jax.profiler.trace(workdir / "profile" / f"step-{step}-process-{distributed.process().index}")
