"""One step of the ring: rollout -> reward -> update -> next state.

Owns the order of a step, and what each phase takes and gives. Must not know when steps are saved, logged or
evaluated, nor which metrics follow from a phase.
"""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.advantages import compute_advantages
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.run.metrics import Rollout, gather_responses, response_metrics, step_row
from ngrpo_jax.run.neighbor_table import add_drift, copy_rows, neighbors, refresh_table
from ngrpo_jax.run.samples import sample_rows
from ngrpo_jax.run.state import Run, RunState, Table
from ngrpo_jax.runtime import console, distributed
from ngrpo_jax.setup.learner import old_logprobs, row_layout
from ngrpo_jax.setup.policy import (
    Policy,
    failures,
    make_policy,
    response_texts,
    sequence_keys,
    sequence_numbers,
    training_request,
    write_responses,
)
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.tasks.datasets import problem_order
from ngrpo_jax.tasks.rewards import Grader


def train_step(
    run: Run, state: RunState, grader: Grader
) -> tuple[RunState, dict[str, float], list[dict[str, Any]]]:
    """Once round the ring. Returns the next state, and the step's rows of metrics.jsonl and samples.jsonl."""
    step, seconds = state.step + 1, dict[str, float]()
    batch = problems_of(run, step)
    with _timed(seconds, "table"):
        table, table_metrics = refresh_table(run, state)
    with _timed(seconds, "rollout"):
        policy = policy_of(run, state.train_state.params, table, run.settings.rollout.quantize)
        trajectories = roll_out(run, policy, batch, step)
    with _timed(seconds, "reward"):
        rollout = grade(run, grader, batch, trajectories)
    responses = gather_responses(rollout)
    metrics = table_metrics | response_metrics(policy, rollout, responses)
    samples = sample_rows(policy, rollout, step) if distributed.process().primary else []
    del policy  # the rollout's copy of the parameters must not outlive the rollout
    train_state, table, learner_metrics = learn(run, state.train_state, table, rollout, seconds)
    row = step_row(run, rollout, responses, metrics | learner_metrics, seconds)
    return RunState(step, train_state, table, state.initial_evaluation), row, samples


def problems_of(run: Run, step: int) -> ProblemSet:
    """This host's share of the problems of a step: every H-th, where H hosts train."""
    settings = run.settings
    order = problem_order(
        len(run.training.problems), seed=settings.seed, step=step, batch=settings.rollout.prompts
    )
    return run.training.take([int(order[i]) for i in distributed.process().share(len(order))])


def policy_of(run: Run, params: Any, table: Table | None, quantize: str | None = None) -> Policy:
    """The parameters laid out for a rollout, rounded as `quantize` does, with the neighbour table."""
    longest = max(run.training.longest_prompt, run.held_out.longest_prompt)
    layout = run.settings.rollout.layout
    params = run.on_devices(params)
    return make_policy(run.model_spec, run.mesh, params, neighbors(run, table), layout, longest, quantize)


def roll_out(run: Run, policy: Policy, batch: ProblemSet, step: int) -> Trajectories:
    """Responses to this host's problems. Those that end in logits that are not finite are told of."""
    request, primary = training_request(policy, run.settings), distributed.process().primary
    numbers_B = sequence_numbers(len(batch.prompts), request.samples)
    keys_B = sequence_keys(run.settings.seed, step, numbers_B)
    with console.Progress(
        f"step {step}: rollout", len(numbers_B), "sequences", keep=False, enabled=primary
    ) as progress:
        trajectories = write_responses(policy, request, batch.prompts, keys_B, progress=progress)
    ids = [problem.id for problem in batch.problems]
    own = failures(trajectories, run.settings.rollout.group, ids)
    sentence = "; ".join(filter(None, distributed.allgather("failures", own)))
    if sentence and primary:
        print(f"warning: step {step}: {sentence}; they are left out of the update.", flush=True)
    return trajectories


def grade(run: Run, grader: Grader, batch: ProblemSet, trajectories: Trajectories) -> Rollout:
    """This host's responses with their rewards."""
    group = run.settings.rollout.group
    texts = response_texts(run.model_spec.tokenizer_info, trajectories)
    golds = [problem.answer for problem in batch.problems for _ in range(group)]
    ids = [f"{problem.id}/{sample}" for problem in batch.problems for sample in range(1, group + 1)]
    before = grader.snapshot()
    rewards_B = np.asarray(grader.grade(texts, golds, run.settings.reward.kind, ids), np.float32)
    return Rollout(batch, trajectories, rewards_B.reshape(-1, group), grader.snapshot().since(before))


def learn(
    run: Run,
    train_state: update.TrainState,
    table: Table | None,
    rollout: Rollout,
    seconds: dict[str, float],
) -> tuple[update.TrainState, Table | None, dict[str, float]]:
    """Advantages, packed rows, old and reference log-probabilities, one optimiser step a mini-batch.

    Groups, and so advantages, are whole on their host; what is a mean over the step is one over all hosts.

    Args:
      train_state: donated.
      seconds: the wall time of the phases is added to it.
    """
    settings = run.settings
    allgather = functools.partial(distributed.allgather, "learning")
    computed = compute_advantages(rollout.rewards_PG, rollout.trajectories, settings.objective, allgather)
    rows = packing.mini_batches(
        packing.Batch(
            [prompt for prompt in rollout.batch.prompts for _ in range(settings.rollout.group)],
            rollout.trajectories,
            computed.advantages_PG.reshape(-1),
            computed.included_PG.reshape(-1),
        ),
        settings.objective,
        row_layout(settings, distributed.process().count),
        count=settings.mini_batches,
        allgather=allgather,
    )
    programs, old, kept = run.learner.programs, old_logprobs(settings), train_state
    train_state = kept._replace(params=run.on_devices(kept.params))
    with _timed(seconds, "logprobs"):
        reference = run.reference_with(train_state.params)
        batches = update.compute_logprobs(programs, train_state.params, reference, rows, old=old)
        jax.block_until_ready(batches)
    before_VD = copy_rows(run, table, train_state.params)
    with _timed(seconds, "update"):
        train_state, steps = update.update(programs, train_state, batches)
        metrics = update.batch_metrics(jax.device_get(steps), gap_of_first=old == "sampler")
    with _timed(seconds, "table"):
        table = add_drift(run, table, before_VD, train_state.params)
    metrics |= computed.metrics
    train_state = kept.changed_to(train_state.changing)
    return train_state, table, {**metrics, "rows/fill": packing.fill_fraction(rows, allgather)}


# Phases that report nothing of their own while they go on.
_PHASES = {
    "table": "neighbour table",
    "reward": "grading",
    "logprobs": "log-probabilities",
    "update": "update",
}
_to_compile = {"logprobs", "update"}  # phases whose first time in this process compiles their programs


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the block's wall time to that of a phase; the block's results must be on the host at its end.

    A phase that takes long says that it goes on, and its first time that it compiles.
    """
    start = time.monotonic()
    label = _PHASES.get(name)
    if label and name in _to_compile:
        label += " (the first time compiles)"
    with console.Progress(label or name, keep=False, enabled=bool(label) and distributed.process().primary):
        yield
    _to_compile.discard(name)
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
