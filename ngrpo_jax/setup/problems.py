"""The problems of a run with their encoded prompts, and the defects of a data set, before the first step.

Owns which problems are left out, and what is printed about that. Must not know the order of problems in
training.
"""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Self

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.settings import Settings
from ngrpo_jax.tasks import cleaning, golds, prompts, rows
from ngrpo_jax.tasks.builders import catalogue
from ngrpo_jax.tasks.datasets import Problem, load_problems, load_training
from ngrpo_jax.tasks.rewards import Grader


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """Problems with their encoded prompts, in the same order, and how many prompts were too long."""

    problems: list[Problem]
    prompts: list[list[int]]
    dropped: int = 0

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    def take(self, indices: Sequence[int]) -> Self:
        """The problems at these indices, in this order."""
        return type(self)([self.problems[i] for i in indices], [self.prompts[i] for i in indices])


def load_set(settings: Settings, tokenizer: Any, split: str) -> ProblemSet:
    """Problems and prompts of `data.train` ("train") or `data.eval` ("test") without those that are too long.

    The training set lacks empty and repeated rows too, and with `data.drop_overlap` the problems of
    evaluation sets. What was left out, and gold answers that cannot be read, are printed.
    """
    data = settings.data
    source = data.train if split == "train" else data.eval
    check_choices(settings, source)
    if split == "train":
        problems = training_problems(settings)
    else:
        problems = load_problems(source, split=split, seed=settings.seed, size=settings.eval.problems)
    check_golds(settings, source, problems)
    kept, encoded, dropped = prompts.encode_problems(
        tokenizer,
        problems,
        data.prompt,
        data.chat_template,
        data.max_prompt_tokens,
        data.system_prompt,
        data.template_options,
    )
    return ProblemSet(kept, encoded, dropped)


def check_choices(settings: Settings, source: str) -> None:
    """UserError for a multiple-choice set of builders/ with prompts or grading of mathematics.

    No response would be right.
    """
    kind, name, *_ = [*re.split("[:/?]", source), ""]
    known = catalogue.configs(name) if kind == "tfds" else {}
    choice = any(entry.kind == catalogue.CHOICE for entry in known.values())
    if choice and "math" in (settings.data.prompt, settings.reward.kind):
        raise UserError(
            f"{source} is multiple choice, but data.prompt is {settings.data.prompt!r} and reward.kind "
            f"{settings.reward.kind!r}; set both to choice (among --sets: prompt=choice reward=choice)."
        )


def training_problems(settings: Settings) -> list[Problem]:
    """The problems of `data.train` that are trained on, before their prompts are encoded.

    Raises:
      UserError: none is left.
    """
    data = settings.data
    loaded = load_training(data.train, seed=settings.seed, size=data.train_size)
    if loaded.nulls or loaded.duplicates:
        print(f"{data.train}: {loaded.duplicates} repeated and {loaded.nulls} empty rows are left out.")
    problems = loaded.problems
    for source in data.held_apart:
        others = load_problems(source, split="test", seed=settings.seed)
        pairs = cleaning.shared([p.problem for p in problems], [p.problem for p in others])
        if not pairs:
            continue
        listed = rows.some(f"{problems[i].id} ({others[j].id} there)" for i, j in pairs)
        what = "left out" if data.drop_overlap else "trained on; data.drop_overlap=true leaves them out"
        print(f"{data.train}: {len(pairs)} problems are in {source} too, and are {what}: {listed}.")
        if data.drop_overlap:
            known = {i for i, _ in pairs}
            problems = [problem for i, problem in enumerate(problems) if i not in known]
    sentence = f"all problems of {data.train} are in an evaluation set too; train on others."
    require(bool(problems), sentence)
    return problems


def check_golds(settings: Settings, source: str, problems: Sequence[Problem]) -> None:
    """With reward.kind "math", prints which gold answers cannot be read; UserError where they are too many.

    A response to such a problem is right only if its answer has the same spelling.
    """
    reward = settings.reward
    if reward.kind != "math":
        return
    with contextlib.closing(Grader(reward.workers, reward.deadline_s, reward.memory_mb)) as grader:
        answers = [problem.answer for problem in problems]
        bad = golds.unreadable(answers, grader, golds.default_cache())
    refusal = golds.refusal(source, answers, bad)
    if refusal is not None:
        raise UserError(f"{refusal}: {rows.some((problems[i].id for i in bad), 3)}.")
    if bad:
        print(
            f"{source}: {len(bad)} gold answers cannot be read, and only the same spelling matches them: "
            f"{rows.some(problems[i].id for i in bad)}."
        )
