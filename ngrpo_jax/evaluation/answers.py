"""The final answer of a response, and when two final answers are the same vote.

Reads answers by the rules of `tasks.grading`, as the grader does. Grades nothing.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from ngrpo_jax.evaluation.statistics.estimates import GradedResponses
from ngrpo_jax.tasks.grading import extraction, plain


def final_answer(response: str, kind: str) -> str | None:
    r"""The text that the grader of `reward.kind` reads as a response's answer; None where there is none.

    "math": the last closed `\boxed{}` after the thinking; "choice": the letter of the last `Answer: X`. What
    a user's own reward reads is not known: for it, the box where there is one, else the last number.
    """
    text = extraction.after_thinking(response)
    if kind == "choice":
        return extraction.choice_letter(text)
    boxed = extraction.last_boxed(text)
    return boxed if kind == "math" or boxed is not None else extraction.last_number(text)


def vote(answer: str | None) -> Hashable | None:
    """A key that equal answers share: their number where they are numbers, else their canonical spelling."""
    if answer is None or not answer.strip():
        return None
    if len(answer) > plain.MAX_ANSWER:
        return answer.strip()
    spelling = plain.canonical(answer)
    number = plain.plain_number(spelling)
    return spelling if number is None else number[0]


def answer_name(kind: str) -> str:
    """What a response without a final answer lacks, in words."""
    return {"math": "no box", "choice": 'no "Answer: X"'}.get(kind, "no box and no number")


def graded_responses(problems: Sequence[Sequence[Mapping[str, Any]]]) -> GradedResponses:
    """From the `reward`, `final`, `tokens` and `stopped` of each response of each problem."""

    def column(name: str) -> list[list[Any]]:
        return [[row[name] for row in rows] for rows in problems]

    return GradedResponses(
        np.array(column("reward"), np.float32),
        [list(map(vote, finals)) for finals in column("final")],
        np.array(column("tokens")),
        np.array(column("stopped")),
    )
