"""Stored generations read again, without a model or a config: their metrics, or verdicts graded anew."""

import pathlib
from collections.abc import Sequence

from ngrpo_jax.errors import require
from ngrpo_jax.evaluation import generations, tables
from ngrpo_jax.evaluation.generations import Generations
from ngrpo_jax.tasks.rewards import Grader


def show(paths: Sequence[pathlib.Path], pass_k: Sequence[int] | None, *, regrade: bool) -> None:
    """Prints the metrics of these files and folders: by the stored rewards, or by grading anew."""
    evaluations = generations.read_all(paths)
    if regrade:
        evaluations = [_regraded(one) for one in evaluations]
    found = [(one, one.metrics(pass_k)) for one in evaluations]
    for one, metrics in found:
        print(tables.details(one, metrics, pass_k or one.pass_k), end="\n\n")
    for step in sorted({one.header["step"] for one in evaluations}):
        of_step = [(one, metrics) for one, metrics in found if one.header["step"] == step]
        names = [one.header["set"] for one, _ in of_step]
        require(
            len(set(names)) == len(names),
            f"two of the files hold step {step} of the same data set; give one of each.",
        )
        print(tables.table_1(of_step, pass_k))


def _regraded(one: Generations) -> Generations:
    with Grader() as grader:
        grader.check(one.reward_kind)
        new, changed = generations.regraded(
            one, lambda texts, golds: grader.grade(texts, golds, one.reward_kind)
        )
    print(f"graded anew: {changed} of {sum(map(len, one.problems))} verdicts changed ({one.path})")
    return new
