"""Held-out problems answered and graded, for the evaluations of a training run and for `evaluate`.

Owns what an evaluation asks of a model, and how the answers of several hosts become one set. Must not know
how responses are written (policy.py), nor where they are kept (generations.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ngrpo_jax.evaluation.answers import final_answer, vote
from ngrpo_jax.evaluation.sets import set_name
from ngrpo_jax.evaluation.statistics import estimates
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import console, distributed
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.policy import (
    Policy,
    evaluation_keys,
    evaluation_request,
    failures,
    response_texts,
    write_responses,
)
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.tasks.rewards import Grader


def evaluate_set(
    policy: Policy, held_out: ProblemSet, settings: Settings, grader: Grader, *, label: str
) -> dict[str, float]:
    """A model's metrics on `data.eval` (docs/evaluation.md); each host writes a share of the problems."""
    name, samples, process = set_name(settings.data.eval), settings.eval.samples, distributed.process()
    share = process.share(len(held_out.problems))
    with console.Progress(
        label, len(share) * samples, "sequences", keep=False, enabled=process.primary
    ) as progress:
        answered = answer_problems(policy, held_out, share, settings, grader, name=name, progress=progress)
    return estimates.training_metrics(answered.graded(settings.reward.kind), settings.eval.largest_k)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Responses to some problems (P, n samples each) of a set, with their scores; of this host's share."""

    trajectories: Trajectories
    texts: list[str]
    rewards_PG: np.ndarray

    def graded(self, kind: str) -> estimates.GradedResponses:
        """What figures are made of, over all hosts; `kind` says where a response's answer stands.

        The problems come in the order of a run of one process. Every process has to call this.
        """
        shape = self.rewards_PG.shape
        written = self.trajectories
        fields = (
            self.rewards_PG.reshape(-1).tolist(),
            [final_answer(text, kind) for text in self.texts],
            written.lengths_B.tolist(),
            written.stopped_B.tolist(),
        )
        responses = list(zip(*fields, strict=True))
        own = [responses[start : start + shape[1]] for start in range(0, len(responses), shape[1])]
        rows = distributed.allgather_items("evaluation", own)
        rewards_PG, finals_PG, lengths_PG, stopped_PG = (
            [[response[field] for response in row] for row in rows] for field in range(4)
        )
        return estimates.GradedResponses(
            np.asarray(rewards_PG, np.float32),
            [[vote(final) for final in finals] for finals in finals_PG],
            np.asarray(lengths_PG),
            np.asarray(stopped_PG),
        )


def answer_problems(
    policy: Policy,
    held_out: ProblemSet,
    problems: Sequence[int],
    settings: Settings,
    grader: Grader,
    *,
    name: str,
    progress: console.Progress,
    done_before: int = 0,
) -> Answered:
    """Writes and grades `eval.samples` responses to the problems of these numbers of the set `name`.

    Args:
      done_before: sequences that the line `progress` already counts.
    """
    samples, request = settings.eval.samples, evaluation_request(policy, settings)
    if not problems:  # a share of fewer problems than hosts
        nothing = Trajectories.empty(0, request.max_new_tokens, 1)
        return Answered(nothing, [], np.zeros((0, samples), np.float32))
    trajectories = write_responses(
        policy,
        request,
        [held_out.prompts[index] for index in problems],
        evaluation_keys(settings.seed, name, problems, samples),
        progress=progress,
        done_before=done_before,
    )
    sentence = failures(trajectories, samples, [held_out.problems[index].id for index in problems])
    if sentence:
        print(f"warning: {name}: {sentence}; they are graded as they stand", flush=True)
    texts = response_texts(policy.tokenizer_info, trajectories)
    golds = [held_out.problems[index].answer for index in problems for _ in range(samples)]
    rewards = np.asarray(grader.grade(texts, golds, settings.reward.kind), np.float32)
    return Answered(trajectories, texts, rewards.reshape(len(problems), samples))
