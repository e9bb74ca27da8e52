"""The tasks of the study: for each its problems, its reward, and the settings that all of its arms share.

The functions named in settings, `rows_…` (data sources) and `reward_…`, are called by the package through
their import paths. Must not know arms or statistics.
"""

import dataclasses
import functools
import pathlib
import random
import re
from typing import Any

from benchmarks.study import search, spelling
from benchmarks.study.search import Family, Problem, Step
from benchmarks.study.spelling import Language

TRAINING_PROBLEMS = 1024  # of a seed
HELD_OUT_PROBLEMS = 256
SAMPLES = 64
PASS_K = (8, 16, 32)
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Search:
    """Search problems and the language that they are written in."""

    family: Family
    language: Language

    def prompt(self, problem: Problem, rng: random.Random) -> str:
        """ "3 7 12 make 33 :" in the words of the language."""
        return self.language.write([*map(str, problem.numbers), "make", str(problem.target), ":"], rng)

    def response(self, steps: list[Step], rng: random.Random) -> str:
        """ "7 * 3 = 21 ; 21 + 12 = 33" in the words of the language."""
        concepts = [";"]
        for left, sign, right, result in steps:
            concepts += [str(left), sign, str(right), "=", str(result), ";"]
        return self.language.write(concepts[1:-1], rng)

    def steps(self, response: str) -> list[Step] | None:
        """The steps that a response writes; None where it has another form."""
        return search.parse(self.language.read(response))

    @property
    def reasoning_words(self) -> str:
        """A regular expression: the tokens of numbers and of + - *."""
        signs = {*search.SIGNS, *(c for c in self.language.words if c.isdecimal())}
        words = [word for concept in sorted(signs) for word in self.language.words[concept]]
        return f"^ ?({'|'.join(map(re.escape, words))})$"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: as the command line has it.
      settings: by dotted names, what the task changes of the package's defaults.
      budget: generated training tokens of a run.
      bases: how many base models there are; seed s starts from number s modulo this.
      first_word: the rows of the vocabulary below it are special tokens.
      reasoning_words: a regular expression, the tokens that the arm "reasoning words out" keeps out of
        mixing.
      matched_temperature: of rollouts, at which GRPO's written tokens have N-GRPO's entropy (plan.md).
      search: None where problems are not of that kind.
    """

    name: str
    settings: dict[str, Any]
    budget: int
    bases: int
    first_word: int
    reasoning_words: str
    matched_temperature: float
    search: Search | None = None


def _search_settings(rows: str, reward: str, family: Family) -> dict[str, Any]:
    """What both search tasks set."""
    length = 6 * (family.count - 1)  # tokens of a solution: six a step, with its ";" or the response's end
    return {
        "model.dtype": "float32",
        "warm_start.num_layers": 2,
        "warm_start.hidden_size": 128,
        "warm_start.intermediate_size": 384,
        "warm_start.num_heads": 4,
        "warm_start.num_kv_heads": 4,
        "warm_start.batch": 64,
        "warm_start.learning_rate": 3e-3,
        "data.train": f"benchmarks.study.tasks:{rows}",
        "data.eval": f"benchmarks.study.tasks:{rows}",
        "data.prompt": "plain",
        "data.chat_template": "plain",
        "data.max_prompt_tokens": family.count + 3,
        "rollout.prompts": 16,
        "rollout.group": 8,
        "rollout.max_new_tokens": length,
        "rollout.temperature": 1.0,
        "rollout.slots": 128,
        "rollout.chunk": 6,
        "mixing.until": None,
        "objective.kl_coef": 0.0,
        "optimizer.learning_rate": 2e-4,
        "optimizer.warmup_steps": 5,
        "train.mini_batch_prompts": 8,
        "train.rows_per_device": 64,  # of one sequence each
        "train.logprob_chunk": 4096,
        "train.remat": "none",
        "train.unroll": True,
        "train.loggers": (),
        "eval.problems": HELD_OUT_PROBLEMS,
        "eval.samples": SAMPLES,
        "eval.pass_k": PASS_K,
        "eval.temperature": 1.0,
        "eval.top_p": 1.0,
        "eval.max_new_tokens": length,
        "reward.kind": f"benchmarks.study.tasks:{reward}",
        "reward.workers": 1,
    }


def _synonyms(name: str, share: float) -> Task:
    family = Family(count=3, largest=12, bound=30)
    found = Search(family, spelling.synonyms(family.bound, share))
    return _search_task(name, found, "synonyms", warm_start=600, response=12, temperature=0.66)


def _countdown() -> Task:
    family = Family(count=4, largest=13, bound=60)
    found = Search(family, spelling.symbols(family.bound))
    return _search_task("countdown", found, "countdown", warm_start=700, response=18, temperature=0.89)


def _search_task(
    name: str, found: Search, reward: str, *, warm_start: int, response: int, temperature: float
) -> Task:
    """A search and its settings.

    Args:
      reward: the name of its reward, after `reward_`.
      warm_start: steps of a base model's training.
      response: tokens of a response, by which 60 steps are the budget.
      temperature: at which GRPO's entropy is that of N-GRPO.
    """
    settings = _search_settings(f"rows_{name}", f"reward_{reward}", found.family)
    return Task(
        name=name,
        settings={**settings, "warm_start.steps": warm_start},
        budget=60 * 128 * response,
        bases=6,
        first_word=len(spelling.SPECIAL),
        reasoning_words=found.reasoning_words,
        matched_temperature=temperature,
        search=found,
    )


def _smollm2() -> Task:
    """Mixed problems of one and two digits for a pretrained model; `model.path` names its directory."""
    return Task(
        name="smollm2",
        settings={
            "model.dtype": "float32",
            "data.train": "benchmarks.study.tasks:rows_smollm2",
            "data.eval": "benchmarks.study.tasks:rows_smollm2",
            "data.prompt": "plain",
            "data.chat_template": str(pathlib.Path(__file__).with_name("smollm2.jinja")),
            "data.max_prompt_tokens": 72,
            "rollout.prompts": 8,
            "rollout.group": 8,
            "rollout.max_new_tokens": 24,
            "rollout.temperature": 1.0,
            "rollout.slots": 64,
            "rollout.chunk": 8,
            "mixing.until": None,
            "objective.kl_coef": 0.0,
            "optimizer.learning_rate": 1e-5,
            "train.mini_batch_prompts": 4,
            "train.row_tokens": 192,
            "train.rows_per_device": 4,
            "train.remat": "none",
            "train.share_prompts": True,
            "train.loggers": (),
            "eval.problems": HELD_OUT_PROBLEMS,
            "eval.samples": SAMPLES,
            "eval.pass_k": PASS_K,
            "eval.temperature": 1.0,
            "eval.top_p": 1.0,
            "eval.max_new_tokens": 24,
            "reward.kind": "ngrpo_jax.tasks.rewards:last_number_reward",
            "reward.workers": 1,
        },
        budget=12 * 64 * 20,
        bases=1,
        first_word=17,
        reasoning_words=r"^ ?(\d+|[-+*×=])$",
        matched_temperature=0.9,
    )


def _search_rows(task: str, split: str, seed: int) -> list[Row]:
    """Different problems of a split ("train" or "test"), drawn and spelled by the seed."""
    drawn, rng = TASKS[task].search, random.Random(f"{task} {split} {seed}")
    assert drawn is not None
    wanted = TRAINING_PROBLEMS if split == "train" else HELD_OUT_PROBLEMS
    found: dict[tuple[tuple[int, ...], int], Row] = {}
    while len(found) < wanted:
        problem, _ = search.play(drawn.family, rng)
        key = tuple(sorted(problem.numbers)), problem.target
        if key in found or problem.held_out != (split == "test"):
            continue
        gold = " ".join(map(str, (problem.target, *problem.numbers)))
        found[key] = {"id": gold, "problem": drawn.prompt(problem, rng), "answer": gold}
    return list(found.values())


def problem_of(gold: str) -> Problem:
    """The problem that a gold answer, "33 3 7 12", describes."""
    target, *numbers = map(int, gold.split())
    return Problem(tuple(numbers), target)


def _search_reward(task: str, response: str, gold: str) -> float:
    """1 where the response solves the problem of `gold`, else 0."""
    written = TASKS[task].search
    assert written is not None
    steps = written.steps(response)
    return float(steps is not None and search.solves(problem_of(gold), steps))


def rows_smollm2(split: str, seed: int) -> list[Row]:
    """Additions, subtractions and products of one and two digits, and short word problems, in equal parts."""
    rng = random.Random(f"smollm2 {split} {seed}")
    wanted = TRAINING_PROBLEMS if split == "train" else HELD_OUT_PROBLEMS
    found: dict[str, Row] = {}
    while len(found) < wanted:
        a, b, c = rng.randint(11, 99), rng.randint(2, 99), rng.randint(2, 9)
        low, high = sorted((a, b))
        text, answer = rng.choice(
            (
                (f"What is {a} + {b}?", a + b),
                (f"What is {high} - {low}?", high - low),
                (f"What is {a} * {c}?", a * c),
                (
                    f"Tom has {a} apples and buys {c} bags of {b % 10 + 1} apples. How many has he now?",
                    a + c * (b % 10 + 1),
                ),
                (f"There were {high} birds on a tree and {low} flew away. How many are left?", high - low),
                (f"A box holds {c} pens. How many pens are in {b} boxes?", b * c),
            )
        )
        key = f"{text} {answer}"
        held_out = search.in_held_out(key)
        if held_out == (split == "test"):
            found[text] = {"id": text, "problem": text, "answer": str(answer)}
    return list(found.values())


_SHARES = {"synonyms": 1.0, "synonyms_half": 0.5, "synonyms_none": 0.0}
TASKS = {
    **{name: _synonyms(name, share) for name, share in _SHARES.items()},
    "countdown": _countdown(),
    "smollm2": _smollm2(),
}
# What settings name by import path. A response in fewer words is read by the language of all of them.
rows_synonyms = functools.partial(_search_rows, "synonyms")
rows_synonyms_half = functools.partial(_search_rows, "synonyms_half")
rows_synonyms_none = functools.partial(_search_rows, "synonyms_none")
rows_countdown = functools.partial(_search_rows, "countdown")
reward_synonyms = functools.partial(_search_reward, "synonyms")
reward_countdown = functools.partial(_search_reward, "countdown")
