"""The final answer of a response, as a thing that responses can agree on.

Joins what `tasks.grading` reads off a text with what `analysis` counts. It grades nothing.
"""

from __future__ import annotations

from collections.abc import Hashable

from ngrpo_jax.tasks import grading


def final_answer(response: str, kind: str) -> str | None:
    r"""What a response answers, None where it does not.

    For "math" the last closed `\boxed{}` after the thinking, for "choice" the letter of the last `Answer: X`:
    what the grader reads. A reward of the user's own may read anything: there it is the box where there is
    one, and else the last number.
    """
    text = grading.after_thinking(response)
    if kind == "choice":
        return grading.choice_letter(text)
    boxed = grading.last_boxed(text)
    return boxed if kind == "math" or boxed is not None else grading.last_number(text)


def vote(answer: str | None) -> Hashable | None:
    """What makes two final answers the same vote: the number where it is one, else its canonical spelling."""
    if answer is None or not answer.strip():
        return None
    if len(answer) > grading.MAX_ANSWER:
        return answer.strip()
    spelling = grading.canonical(answer)
    number = grading.plain_number(spelling)
    return spelling if number is None else number[0]


def answer_name(kind: str) -> str:
    """What a response without a final answer lacks, in words."""
    return {"math": "no box", "choice": 'no "Answer: X"'}.get(kind, "no box and no number")
