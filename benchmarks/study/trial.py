"""One run: a task, an arm and a seed -> the record of it. The package's own parts, put together in one
process.

Owns what a run does, and what is recorded of it. Runs of one arm share its compiled programs, whatever their
seeds. Must not know which runs are wanted, or how they are compared.
"""

import dataclasses
import importlib.metadata
import math
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.study import search, strategies
from benchmarks.study.arms import ARMS
from benchmarks.study.bases import base_directory
from benchmarks.study.tasks import TASKS, Task
from ngrpo_jax.config_files import put
from ngrpo_jax.evaluation.answering import Responses, sample_and_grade
from ngrpo_jax.evaluation.cosines import mixed_cosines
from ngrpo_jax.evaluation.sets import EvalSet, set_name
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.run.neighbor_table import refresh_table
from ngrpo_jax.run.start import begin, compose
from ngrpo_jax.run.state import Run, RunState
from ngrpo_jax.run.step import grade, learn, policy_of, problems_of, roll_out
from ngrpo_jax.runtime import console
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.schema import as_config_dict
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.model_spec import load_params
from ngrpo_jax.setup.policy import Policy
from ngrpo_jax.setup.problems import ProblemSet, load_set
from ngrpo_jax.tasks.rewards import Grader

EVALUATION_SLOTS = 512  # an evaluation has many more sequences than a step
Record = dict[str, Any]


def settings_of(task: Task, arm: str, seed: int, changes: dict[str, Any]) -> Settings:
    """The checked settings of a run; `changes` come last, by dotted names."""
    strategies.register(task.first_word)
    config = as_config_dict(Settings())
    values = {"seed": seed, "train.steps": 1, **task.settings, **ARMS[arm].changes(task), **changes}
    for name, value in values.items():
        put(config, name, value)
    return resolve(config)


class Study:
    """Runs one after the other, with the programs that they share.

    Args:
      work: a folder for base models and whatever a run writes beside its record.
      devices: the mesh.
      changes: of all runs' settings, by dotted names.
      model: the directory of a pretrained model, for tasks that have no base models of their own.
      budget: generated training tokens of a run; None: the task's.
    """

    def __init__(
        self,
        work: pathlib.Path,
        devices: jax.sharding.Mesh,
        changes: dict[str, Any] | None = None,
        model: str | None = None,
        budget: int | None = None,
    ) -> None:
        self._work, self._devices, self._changes, self._model = work, devices, changes or {}, model
        self._budget = budget
        self._composed: dict[tuple[str, str], Run] = {}
        self._grader = Grader(workers=1)

    def run(self, name: str, arm: str, seed: int) -> Record:
        """Trains the arm on the seed's problems until its budget is spent, and evaluates it."""
        task = TASKS[name]
        prepared = self._prepared(task, arm, seed)  # makes a base that is missing, which is no run's time
        began, cpu = time.perf_counter(), time.process_time()
        run, state = self._begin(prepared)
        trace = Trace()
        budget = (self._budget or task.budget) if ARMS[arm].trains else 0
        while trace.tokens < budget:
            state = train_step(task, run, state, self._grader, trace)
        found = evaluate(task, run, state, self._grader)
        return {
            "task": name,
            "arm": arm,
            "seed": seed,
            "base": seed % task.bases,
            **found,
            "train": trace.summary(),
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "versions": versions(),
            **({"changes": {k: str(v) for k, v in self._changes.items()}} if self._changes else {}),
        }

    def responses(self, name: str, arm: str, seed: int) -> tuple[Responses, ProblemSet, tuple[str, ...]]:
        """Responses of an arm that does not train to held-out problems, these, and the vocabulary."""
        task = TASKS[name]
        assert task.search is not None and not ARMS[arm].trains
        run, state = self._begin(self._prepared(task, arm, seed))
        return sample_held_out(run, state, self._grader)[1], run.held_out, task.search.language.vocabulary

    def _prepared(self, task: Task, arm: str, seed: int) -> Run:
        """The run of a seed, with the programs that the arm's first run has compiled."""
        settings, key = settings_of(task, arm, seed, self._changes), (task.name, arm)
        base = self._model or str(base_directory(task, settings.warm_start, seed % task.bases, self._work))
        if key not in self._composed:
            of_model = dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=base))
            workdir = self._work / "composed" / task.name / arm
            workdir.mkdir(parents=True, exist_ok=True)
            self._composed[key] = compose(of_model, workdir, self._devices)
        first = self._composed[key]
        tokenizer = first.model_spec.tokenizer_info.tokenizer
        return dataclasses.replace(
            first,
            settings=settings,
            model_spec=dataclasses.replace(first.model_spec, directory=base, seed=seed),
            training=load_set(settings, tokenizer, "train"),
            held_out=load_set(settings, tokenizer, "test"),
        )

    def _begin(self, run: Run) -> tuple[Run, RunState]:
        """The run and its state before the first step; nothing is kept on disk."""
        with (
            tempfile.TemporaryDirectory() as folder,
            Checkpoints(pathlib.Path(folder) / "checkpoints", model=None) as nothing,
        ):
            return begin(run, load_params(run.model_spec, self._devices), nothing)


@dataclasses.dataclass
class Trace:
    """What is kept of a run's training steps, one number a step in each list."""

    tokens: int = 0  # generated so far
    rewards: list[float] = dataclasses.field(default_factory=list)
    entropy: list[float] = dataclasses.field(default_factory=list)  # of the policy, nats a token
    zero_variance: list[float] = dataclasses.field(default_factory=list)  # share of groups
    paths: list[float] = dataclasses.field(default_factory=list)  # distinct ones a group
    mixed: list[float] = dataclasses.field(default_factory=list)  # share of response tokens
    cosine: list[float] = dataclasses.field(default_factory=list)  # of mixed inputs to their anchors
    synonyms: list[float] = dataclasses.field(default_factory=list)  # share of the others' weight

    def summary(self) -> Record:
        """Totals and means, and the rewards of every step; None where nothing was recorded."""

        def mean(values: list[float]) -> float | None:
            known = [value for value in values if not math.isnan(value)]
            return round(sum(known) / len(known), 4) if known else None

        named = ("entropy", "zero_variance", "paths", "mixed", "cosine", "synonyms")
        return {
            "steps": len(self.rewards),
            "tokens": self.tokens,
            "rewards": [round(reward, 3) for reward in self.rewards],
            **{name: mean(getattr(self, name)) for name in named},
        }


def train_step(task: Task, run: Run, state: RunState, grader: Grader, trace: Trace) -> RunState:
    """One step of the package's ring; what the study records of it is added to `trace`."""
    step = state.step + 1
    batch = problems_of(run, step)
    table, _ = refresh_table(run, state)
    policy = policy_of(run, state.train_state.params, table)
    rollout = grade(run, grader, batch, roll_out(run, policy, batch, step))
    written, rewards_PG = rollout.trajectories, rollout.rewards_PG
    trace.tokens += int(written.lengths_B.sum())
    trace.rewards.append(float(rewards_PG.mean()))
    trace.zero_variance.append(float((rewards_PG.max(axis=1) == rewards_PG.min(axis=1)).mean()))
    trace.mixed.append(float(written.mixed_BT.sum() / written.lengths_B.sum()))
    found = mixing_figures(task, policy, written)
    trace.cosine.append(found["cosine"])
    trace.synonyms.append(found["synonyms"])
    paths_PG = np.array(paths(task, written), object).reshape(rewards_PG.shape)
    trace.paths.append(float(np.mean([len(set(group) - {None}) for group in paths_PG])))
    train_state, table, metrics = learn(run, state.train_state, table, rollout, {})
    trace.entropy.append(metrics["learner/entropy"])
    return RunState(step, train_state, table, state.initial_evaluation)


def mixing_figures(task: Task, policy: Policy, written: Trajectories) -> dict[str, float]:
    """Of the mixed inputs: mean cosine to their anchors, and the synonyms' share of what is not the anchor's
    weight.

    NaN where nothing was mixed, and for the share where there is one candidate alone or no language.
    """
    if not written.mixed_BT.any():
        return {"cosine": math.nan, "synonyms": math.nan}
    cosine = float(mixed_cosines(policy, written)[1].mean())
    ids_IC, weights_IC = (leaf[written.mixed_BT] for leaf in written.mixtures[:2])
    others = float(weights_IC[:, 1:].sum())
    if task.search is None or others == 0:
        return {"cosine": cosine, "synonyms": math.nan}
    concept_V = concept_numbers(task)
    same_IC = concept_V[ids_IC[:, 1:]] == concept_V[ids_IC[:, :1]]
    return {"cosine": cosine, "synonyms": float((weights_IC[:, 1:] * same_IC).sum()) / others}


def concept_numbers(task: Task) -> np.ndarray:
    """int [V]: equal for words of one concept."""
    assert task.search is not None
    language = task.search.language
    numbers: dict[str, int] = {}
    names = [language.concepts.get(word, word) for word in language.vocabulary]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def paths(task: Task, written: Trajectories) -> list[str | None]:
    """The name of the path that each response takes, right or wrong; None where it has no steps."""
    if task.search is None:
        return [None] * len(written.lengths_B)
    language = task.search.language
    concepts = [language.concepts.get(word, "") for word in language.vocabulary]  # "" for special tokens
    found = list[str | None]()
    for i in range(len(written.lengths_B)):
        words = [concepts[token] for token in written.response(i).tolist()]
        steps = search.parse([word for word in words if word])
        found.append(None if steps is None else search.path(steps))
    return found


def sample_held_out(run: Run, state: RunState, grader: Grader) -> tuple[Policy, Responses]:
    """Graded samples to each held-out problem, and the policy that wrote them."""
    rollout = dataclasses.replace(run.settings.rollout, slots=EVALUATION_SLOTS)
    settings = dataclasses.replace(run.settings, rollout=rollout)
    table = refresh_table(run, state)[0] if settings.eval.mixing else None
    policy = policy_of(run, state.train_state.params, table)
    one, everything = EvalSet(set_name(settings.data.eval), settings), range(len(run.held_out.problems))
    with console.Progress("evaluation", enabled=False) as progress:
        return policy, sample_and_grade(policy, one, run.held_out, everything, grader, progress)


def evaluate(task: Task, run: Run, state: RunState, grader: Grader) -> Record:
    """Of each held-out problem: correct samples, distinct correct paths, distinct paths of any kind.

    Counts are bytes in hexadecimal, two letters a problem.
    """
    policy, responses = sample_held_out(run, state, grader)
    written, correct_PG = responses.trajectories, responses.rewards_PG > 0.5
    taken_PG = np.array(paths(task, written), object).reshape(correct_PG.shape)
    right = [len(set(row[flags])) for row, flags in zip(taken_PG, correct_PG, strict=True)]
    distinct = [len(set(row) - {None}) for row in taken_PG]
    tokens = int(written.lengths_B.sum())
    figures = mixing_figures(task, policy, written)
    return {
        "samples": run.settings.eval.samples,
        "correct": packed(correct_PG.sum(axis=1).tolist()),
        "correct_paths": packed(right),
        "paths": packed(distinct),
        "entropy": round(float(-written.logprobs_BT.sum()) / tokens, 4),
        "length": round(tokens / len(written.lengths_B), 2),
        **{name: round(x, 4) for name, x in figures.items() if not math.isnan(x)},
    }


def packed(counts: list[int]) -> str:
    """Counts below 256 as two hexadecimal letters each."""
    return bytes(counts).hex()


def unpacked(text: str) -> np.ndarray:
    """The counts of `packed`, int [P]."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).astype(int)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    named = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"python": platform.python_version(), **named}
