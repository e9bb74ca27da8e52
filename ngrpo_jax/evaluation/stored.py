"""Stored generations read again, without a model or a config: their metrics, or verdicts graded anew."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from ngrpo_jax.errors import require
from ngrpo_jax.evaluation import generations, tables
from ngrpo_jax.evaluation.answers import final_answer
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
    rows, kind = [row for problem in one.problems for row in problem], one.reward_kind
    with Grader() as grader:
        grader.check(kind)
        verdicts = grader.grade([row["response"] for row in rows], [row["answer"] for row in rows], kind)
    rewards = np.asarray(verdicts, np.float32).tolist()  # as a file has them
    changed = sum(row["reward"] != reward for row, reward in zip(rows, rewards, strict=True))
    print(f"graded anew: {changed} of {len(rows)} verdicts changed ({one.path})")
    anew = [
        {**row, "reward": reward, "final": final_answer(row["response"], kind)}
        for row, reward in zip(rows, rewards, strict=True)
    ]
    return dataclasses.replace(one, problems=generations.by_problem(anew, one.samples))
