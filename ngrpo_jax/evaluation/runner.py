"""Evaluates a checkpoint on several data sets: samples, grades and stores what each of them lacks.

Owns the order of work and what is printed about it. Must not know flags, nor where a checkpoint comes from.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

from ngrpo_jax.evaluation.answering import sample_and_grade
from ngrpo_jax.evaluation.cosines import mixed_cosines
from ngrpo_jax.evaluation.sets import EvalSet
from ngrpo_jax.evaluation.writer import GenerationsWriter, response_rows
from ngrpo_jax.runtime import console
from ngrpo_jax.setup.model_spec import ModelSpec
from ngrpo_jax.setup.policy import Policy, compile_rollouts, evaluation_mixes, evaluation_request
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.tasks.rewards import Grader

# Sequences that are sampled, graded and stored together, for each slot: slots are idle at the end of such a
# batch, and an interruption loses one.
SEQUENCES_PER_SLOT = 8


@dataclasses.dataclass(frozen=True)
class SetEvaluation:
    """A data set under evaluation: its settings, its problems, and the file of its generations."""

    eval_set: EvalSet
    problems: ProblemSet
    writer: GenerationsWriter

    @property
    def complete(self) -> bool:
        """Whether the file holds all problems."""
        return self.writer.finished >= len(self.problems.problems)


def announce(model_spec: ModelSpec, evaluations: Sequence[SetEvaluation], needed_bytes: int) -> None:
    """Prints what is going to be evaluated; `needed_bytes` of memory on each device, by estimate."""
    print(f"model      {model_spec.directory} ({model_spec.config.architecture})")
    print(f"memory     about {console.format_bytes(needed_bytes)} on each device, by estimate")
    for one in evaluations:
        finished, problems, settings = one.writer.finished, one.problems, one.eval_set.settings
        there = f", {finished} of them done already" if finished else ""
        print(
            f"set        {one.eval_set.name}: {len(problems.problems)} problems × {settings.eval.samples} "
            f"samples{there} ({problems.dropped} left out as too long)",
            flush=True,
        )
    settings = evaluations[0].eval_set.settings
    if evaluation_mixes(settings):
        print(f"mixing     on, rate {settings.mixing.rate}")


def run(policy: Policy, evaluations: Sequence[SetEvaluation], grader: Grader) -> None:
    """Compiles the rollouts of the sets that are not complete, then completes each set."""
    requests = [evaluation_request(policy, one.eval_set.settings) for one in evaluations if not one.complete]
    compile_rollouts(policy, list(dict.fromkeys(requests)))
    for one in evaluations:
        if not one.complete:
            _complete(policy, one, grader)


def _complete(policy: Policy, evaluation: SetEvaluation, grader: Grader) -> None:
    """Samples, grades and stores the responses that the file lacks, batch by batch, and prints the speed."""
    eval_set, problems, writer = evaluation.eval_set, evaluation.problems, evaluation.writer
    settings, samples = eval_set.settings, eval_set.settings.eval.samples
    count, before, graded_before = len(problems.problems), writer.finished, grader.snapshot()
    size = max(1, SEQUENCES_PER_SLOT * settings.rollout.slot_count // samples)
    begun, tokens = time.monotonic(), 0
    line = console.Progress(eval_set.name, count * samples, "sequences", start=before * samples, keep=False)
    with line as progress:
        for batch in batches(before, count, size):
            responses = sample_and_grade(
                policy, eval_set, problems, batch, grader, progress, batch.start * samples
            )
            mixes = evaluation_mixes(settings)
            cosines = mixed_cosines(policy, responses.trajectories) if mixes else None
            writer.append(response_rows(responses, problems, batch, settings.reward.kind, cosines))
            tokens += int(responses.trajectories.lengths_B.sum())
    seconds = time.monotonic() - begun
    graded = grader.snapshot().since(graded_before)
    print(
        f"{eval_set.name}: {count - before} problems × {samples} samples in "
        f"{console.format_seconds(seconds)} ({console.format_rate(tokens / seconds, 'tokens')}); graded at "
        f"{console.format_rate(graded.per_second, 'verdicts')}, {graded.timeouts + graded.failures} without "
        "a verdict",
        flush=True,
    )


def batches(first: int, count: int, size: int) -> list[range]:
    """The numbers first..count-1 in as few ranges of at most `size` as possible, nearly equally long."""
    parts = -(-(count - first) // size)
    bounds = [first + (count - first) * part // parts for part in range(parts + 1)] if parts else []
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
