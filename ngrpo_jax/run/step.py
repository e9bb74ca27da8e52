"""One step of the ring: rollout -> reward -> update -> next state.

Owns the order of a step and its phases' times. Must not know when steps are saved, logged or evaluated.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from ngrpo_jax.learner import advantages, packing, update
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.run.metrics import gather_outcome, rollout_figures, sample_rows, step_row
from ngrpo_jax.run.neighbor_table import Serving, after_update, before_update, serve
from ngrpo_jax.run.state import Run, RunState
from ngrpo_jax.runtime import distributed
from ngrpo_jax.setup.learner import old_logprobs
from ngrpo_jax.setup.policy import (
    Policy,
    failures,
    make_policy,
    response_texts,
    training_draws,
    write_responses,
)
from ngrpo_jax.tasks.datasets import Problem
from ngrpo_jax.tasks.rewards import Counts, Grader


def train_step(
    run: Run, state: RunState, grader: Grader
) -> tuple[RunState, dict[str, float], list[dict[str, Any]]]:
    """Once round the ring. Returns the next state, the step's metrics, and a few responses to look at."""
    seconds: dict[str, float] = {}
    step, problems = state.step + 1, next(state.stream)
    prompts = [run.prompt_of[problem.id] for problem in problems]

    with _timed(seconds, "table"):
        served = serve(run, state)
    policy, trajectories = roll_out(run, state, served, problems, prompts, seconds)
    rewards_PG, graded = grade(run, grader, problems, trajectories, seconds)
    outcome = gather_outcome(trajectories, rewards_PG)
    figures = rollout_figures(policy, trajectories, outcome)
    del policy  # the rollout's copy of the parameters must not outlive the rollout

    before_VD = before_update(run, served, state.train_state.params)
    train_state, learned = learn(run, state.train_state, prompts, trajectories, rewards_PG, seconds)
    if not np.isfinite(learned["learner/grad_norm"]):
        raise _not_finite(run, f"the gradient of step {step} is not finite")
    with _timed(seconds, "table"):
        followed = after_update(run, served, before_VD, train_state.params)

    figures |= learned | ({} if served is None else served.figures)
    row = step_row(run, prompts, trajectories, outcome, graded, figures, seconds)
    samples = sample_rows(run.model_spec.tokenizer_info, problems, trajectories, rewards_PG, step=step)
    age = 0 if served is None else served.age
    return RunState(step, train_state, followed, age, state.stream, state.initial_evaluation), row, samples


def roll_out(
    run: Run,
    state: RunState,
    served: Serving | None,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    seconds: dict[str, float],
) -> tuple[Policy, Trajectories]:
    """Responses to this host's problems, and who wrote them; all hosts stop where one's cannot be used."""
    step = state.step + 1
    with _timed(seconds, "rollout"):
        policy = policy_of(run, state, served)
        trajectories = write_responses(
            policy,
            prompts,
            run.settings,
            label=f"step {step}: rollout",
            stream=step,
            draws=training_draws(run.settings),
        )
    own = failures(trajectories, run.settings.rollout.group, [problem.id for problem in problems])
    sentence = "; ".join(filter(None, distributed.allgather("failures", own)))
    if sentence:
        raise _not_finite(run, f"step {step}: {sentence}")
    return policy, trajectories


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
        texts = response_texts(run.model_spec.tokenizer_info, trajectories)
        golds = [problem.answer for problem in problems for _ in range(group)]
        before = grader.snapshot()
        rewards_B = np.asarray(grader.grade(texts, golds, run.settings.reward.kind), np.float32)
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
    train_state: update.TrainState,
    prompts: Sequence[Sequence[int]],
    trajectories: Trajectories,
    rewards_PG: np.ndarray,
    seconds: dict[str, float],
) -> tuple[update.TrainState, dict[str, float]]:
    """Advantages, packed rows, old and reference log-probabilities, one optimiser step a mini-batch.

    Groups, and so advantages, are whole on their host; what is a mean over the step is one over all hosts.
    """
    settings, hosts = run.settings, distributed.process().count
    gather = functools.partial(distributed.allgather, "learning")
    earned = advantages.assign(rewards_PG, trajectories, settings.objective, settings.rollout.max_new_tokens)
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
        scored = update.score(run.programs, train_state.params, run.reference, batches, old=old)
        jax.block_until_ready(scored)
    with _timed(seconds, "update"):
        train_state, steps = update.update(run.programs, train_state, scored)
        figures = update.figures(jax.device_get(steps), gap_of_first=old == "sampler")
    figures |= advantages.join_figures(gather(earned.figures))
    return train_state, {**figures, "rows/fill": packing.fill(batches, gather)}


def policy_of(run: Run, state: RunState, served: Serving | None) -> Policy:
    """Today's parameters ready to write, mixing by the table that serves."""
    table_VC = None if served is None else served.table_VC
    return make_policy(
        run.model_spec, run.mesh, state.train_state.params, table_VC, run.settings.rollout.layout
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds to a phase's wall time in seconds; results must be on the host by its end."""
    start = time.monotonic()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
