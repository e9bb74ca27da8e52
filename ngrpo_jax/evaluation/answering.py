"""Responses to held-out problems, sampled and graded, for the evaluations of a run and for `evaluate`.

Owns what an evaluation requests of a model, and how the responses of several processes become one set. Must
not know how responses are sampled (setup/policy.py), nor where they are stored (generations.py).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ngrpo_jax.evaluation.answers import final_answer, graded_responses
from ngrpo_jax.evaluation.generations import by_problem
from ngrpo_jax.evaluation.sets import EvalSet, set_name
from ngrpo_jax.evaluation.statistics.estimates import Estimate, GradedResponses, training_estimates
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


@dataclasses.dataclass(frozen=True)
class Responses:
    """Graded responses to this process's share of the problems, P of them, G samples each, prompt-major."""

    trajectories: Trajectories
    texts: list[str]
    rewards_PG: np.ndarray


def evaluate_set(
    policy: Policy, problems: ProblemSet, settings: Settings, grader: Grader, *, label: str
) -> tuple[dict[str, Estimate], list[int]]:
    """A model's metrics on `data.eval` (docs/evaluation.md), and each problem's count of correct responses.

    Each process samples a share; all call this.
    """
    process, eval_set = distributed.process(), EvalSet(set_name(settings.data.eval), settings)
    share = process.share(len(problems.problems))
    count = len(share) * settings.eval.samples
    with console.Progress(label, count, "sequences", keep=False, enabled=process.primary) as progress:
        responses = sample_and_grade(policy, eval_set, problems, share, grader, progress)
    graded = gather(responses, settings.reward.kind)
    return training_estimates(graded, settings.eval.largest_k), graded.correct_PG.sum(axis=1).tolist()


def sample_and_grade(
    policy: Policy,
    eval_set: EvalSet,
    problems: ProblemSet,
    indices: Sequence[int],
    grader: Grader,
    progress: console.Progress,
    done_before: int = 0,
) -> Responses:
    """`eval.samples` responses to each of the problems at `indices` of the set.

    Args:
      done_before: sequences that `progress` counts already.
    """
    settings, samples = eval_set.settings, eval_set.settings.eval.samples
    request = evaluation_request(policy, settings)
    if not indices:  # a process's share, where there are fewer problems than processes
        nothing = Trajectories.empty(0, request.max_new_tokens, 1)
        return Responses(nothing, [], np.zeros((0, samples), np.float32))
    trajectories = write_responses(
        policy,
        request,
        [problems.prompts[index] for index in indices],
        evaluation_keys(settings.seed, eval_set.name, indices, samples),
        progress=progress,
        done_before=done_before,
    )
    sentence = failures(trajectories, samples, [problems.problems[index].id for index in indices])
    if sentence:
        print(f"warning: {eval_set.name}: {sentence}; they are graded all the same", flush=True)
    texts = response_texts(policy.tokenizer_info, trajectories)
    sampled = [(problems.problems[index], sample) for index in indices for sample in range(1, samples + 1)]
    golds, ids = [one.answer for one, _ in sampled], [f"{one.id}/{sample}" for one, sample in sampled]
    rewards = np.asarray(grader.grade(texts, golds, settings.reward.kind, ids), np.float32)
    return Responses(trajectories, texts, rewards.reshape(len(indices), samples))


def gather(responses: Responses, kind: str) -> GradedResponses:
    """The graded responses of all processes, problems in the order of a run of one process.

    Every process has to call this. `kind`: `reward.kind`, by which final answers are read.
    """
    written, samples = responses.trajectories, responses.rewards_PG.shape[1]
    columns = {
        "reward": responses.rewards_PG.reshape(-1).tolist(),
        "final": [final_answer(text, kind) for text in responses.texts],
        "tokens": written.lengths_B.tolist(),
        "stopped": written.stopped_B.tolist(),
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return graded_responses(distributed.allgather_items("evaluation", by_problem(rows, samples)))
