"""Generations of an evaluation on disk: one JSONL file a data set and step, added to until it is whole.

The first row is a header: what the responses depend on, and what their figures need. Each further row is one
response, the n of a problem together, problems in their order. Owns this format, its reading, and the rule
that only the same evaluation goes on in it. Knows no model: figures come from the file alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.evaluation.answering import Answered
from ngrpo_jax.evaluation.answers import final_answer, vote
from ngrpo_jax.evaluation.sets import EvalSet
from ngrpo_jax.evaluation.statistics import estimates, geometry, paper
from ngrpo_jax.setup.problems import ProblemSet

FORMAT = 1
_FIELDS = ("id", "sample", "response", "reward", "final", "tokens", "stopped")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Generations:
    """What a file holds: its header, and the rows of each finished problem."""

    path: pathlib.Path
    header: Row
    problems: list[list[Row]]

    @property
    def label(self) -> str:
        """How the evaluation is called in a table."""
        return f"{self.header['set']}, step {self.header['step']}"

    @property
    def pass_k(self) -> tuple[int, ...]:
        """The k that were asked for when the file was begun."""
        return tuple(self.header["pass_k"])

    def graded(self) -> estimates.GradedResponses:
        """The arrays that figures are made of."""
        return estimates.GradedResponses(
            np.array([[row["reward"] for row in rows] for rows in self.problems], np.float32),
            [[vote(row["final"]) for row in rows] for rows in self.problems],
            np.array([[row["tokens"] for row in rows] for rows in self.problems]),
            np.array([[row["stopped"] for row in rows] for rows in self.problems]),
        )

    def metrics(self, pass_k: Sequence[int] | None = None) -> dict[str, estimates.Estimate]:
        """Every figure of the finished problems. ValueError, naming the file, for none or n < k."""
        require(bool(self.problems), f"{self.path} holds no finished problem yet; evaluate goes on in it.")
        wanted, samples = tuple(pass_k or self.pass_k), self.header["depends"]["eval.samples"]
        require(
            max(wanted) <= samples,
            f"{self.path} has {samples} samples a problem; Pass@{max(wanted)} needs {max(wanted)} or more.",
        )
        return estimates.estimate_metrics(self.graded(), wanted)

    def cosines(self) -> dict[str, float] | None:
        """Appendix E over every mixed input; None where nothing was mixed."""
        found = [value for rows in self.problems for row in rows for value in row.get("cosines", ())]
        return geometry.cosine_metrics(np.array(found)) if found else None


def file_of(folder: pathlib.Path, step: int, name: str) -> pathlib.Path:
    """Where the generations of a step on a data set stand."""
    return folder / f"generations_{step}_{name}.jsonl"


def make_header(one: EvalSet, problems: ProblemSet, step: int, facts: dict[str, Any]) -> Row:
    """The header of an evaluation: under `depends`, leaf by leaf, all that its responses are a function of.

    Args:
      facts: of the parameters, from `composition.fingerprint`.
    """
    settings = one.settings
    own = dataclasses.asdict(settings.eval)
    depends = {"set": one.name, "step": step, "seed": settings.seed, "weights": facts["weights"]}
    depends |= {"model.dtype": settings.model.dtype, "problems": _digest(problems)}
    for leaf in ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "mixing"):
        depends[f"eval.{leaf}"] = own[leaf]
    if own["mixing"]:
        depends |= {f"mixing.{leaf}": value for leaf, value in dataclasses.asdict(settings.mixing).items()}
    depends["reward.kind"] = settings.reward.kind
    leaves = ("strategy", "rate", "metric", *paper.NEIGHBOR)
    trained = {leaf: getattr(settings.mixing, leaf) for leaf in leaves}
    header = {
        "format": FORMAT,
        "set": one.name,
        "step": step,
        "source": settings.data.eval,
        "model": settings.model.path,
        "problems": len(problems.problems),
        "too_long": problems.dropped,
        "pass_k": list(settings.eval.pass_k),
        "trained": {**trained, "algorithm": settings.objective.algorithm},
        "depends": depends,
    }
    return json.loads(json.dumps(header))


def rows_of(
    answered: Answered,
    problems: ProblemSet,
    numbers: range,
    kind: str,
    cosines: tuple[np.ndarray, np.ndarray] | None,
) -> list[Row]:
    """The rows of some answered problems; `cosines` as `figures.mixed_cosines` gives them."""
    trajectories, samples = answered.trajectories, answered.rewards_PG.shape[1]
    rows = []
    for index, text in enumerate(answered.texts):
        problem = problems.problems[numbers[index // samples]]
        tokens = trajectories.response(index)
        row = {
            "id": problem.id,
            "problem": problem.problem,
            "answer": problem.answer,
            "sample": index % samples,
            "response": text,
            "final": final_answer(text, kind),
            "reward": float(answered.rewards_PG.reshape(-1)[index]),
            "tokens": len(tokens),
            "stopped": bool(trajectories.stopped_B[index]),
            "token_ids": tokens.tolist(),
            "mixed_at": np.flatnonzero(trajectories.mixed_BT[index, : len(tokens)]).tolist(),
        }
        if cosines is not None:
            places, values = cosines
            row["cosines"] = [round(float(value), 6) for value in values[places[:, 0] == index]]
        rows.append(row)
    return rows


class Store:
    """A file that an evaluation is written to, problem by problem, and goes on in.

    Opening it refuses a file of another evaluation, and notes how far it goes; the first `append` cuts away
    what a stopped process left unfinished.
    """

    def __init__(self, path: pathlib.Path, header: Row):
        self.path, self._header = path, header
        self.generations, self._whole = Generations(path, header, []), 0
        if path.exists() and path.stat().st_size:
            self.generations, self._whole = _read(path)
        if self._whole:
            _same_evaluation(path, self.generations.header["depends"], header["depends"])
        self._appends = False

    @property
    def done(self) -> int:
        """Finished problems."""
        return len(self.generations.problems)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds the rows of whole problems; they are on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._appends:
            with self.path.open("ab") as file:
                file.truncate(self._whole)
            self._appends = True
        lines = [] if self._whole else [self._header]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*lines, *rows])
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(text.encode())
        samples = self._header["depends"]["eval.samples"]
        self.generations.problems.extend(_in_groups(list(rows), samples))


def read(path: pathlib.Path) -> Generations:
    """A file's finished problems.

    Raises:
      ValueError: it is no file of generations, or a line within it is damaged; file and line are named.
      FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"there is no file of generations {path}; evaluate writes one")
    generations, whole = _read(path)
    require(whole > 0, f"{path} is empty; evaluate writes generations.")
    return generations


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every file of generations in a workdir."""
    return sorted(folder.glob("generations_*.jsonl"))


def _read(path: pathlib.Path) -> tuple[Generations, int]:
    """(what is finished, bytes that it takes): a last problem without all its rows is not."""
    ends, rows, position = [], [], 0
    # Not splitlines(), which also cuts at characters that JSON leaves as they are.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        position += len(line) + 1
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            if number == len(lines) - 1:
                break  # the tail of a write that was cut off may hold anything
            raise UserError(f"{path} line {number} is not JSON; remove the file, or that line on") from error
        rows.append(row)
        ends.append(position)
    if not rows:
        return Generations(path, {}, []), 0
    header, samples = rows[0], _samples(path, rows[0])
    groups = _in_groups(rows[1:], samples)
    for index, row in enumerate(rows[1:]):
        _check(path, index, row, samples, groups)
    return Generations(path, header, groups), ends[len(groups) * samples]


def _samples(path: pathlib.Path, header: Any) -> int:
    """Samples a problem, of a header that is one."""
    names = ("set", "step", "model", "problems", "pass_k", "trained", "depends")
    good = isinstance(header, dict) and header.get("format") == FORMAT and all(n in header for n in names)
    require(good, f"{path} line 1 is no header of generations; name a file that evaluate wrote.")
    return int(header["depends"]["eval.samples"])


def _in_groups(rows: list[Row], samples: int) -> list[list[Row]]:
    """The rows of each whole problem; those of a last one that is not whole are left out."""
    whole = len(rows) - len(rows) % samples
    return [rows[start : start + samples] for start in range(0, whole, samples)]


def _check(path: pathlib.Path, index: int, row: Any, samples: int, groups: list[list[Row]]) -> None:
    place = f"{path} line {index + 2}"
    missing = [name for name in _FIELDS if not isinstance(row, dict) or name not in row]
    require(not missing, f"{place} has no {', '.join(missing)}; remove the file, or that line on.")
    number, sample = divmod(index, samples)
    first = groups[number][0]["id"] if number < len(groups) else row["id"]
    require(
        (row["id"], row["sample"]) == (first, sample),
        f"{place} is sample {row['sample']} of problem {row['id']!r} where sample {sample} of {first!r} "
        "belongs; remove the file, or that line on.",
    )


def _same_evaluation(path: pathlib.Path, there: Row, here: Row) -> None:
    changed = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    facts = "; ".join(f"{name} {there.get(name)}, not {here.get(name)}" for name in changed)
    require(
        not changed,
        f"{path} was made with {facts}; use those, remove the file, or name another --generations=DIR.",
    )


def _digest(problems: ProblemSet) -> str:
    """A digest of the problems as the model sees them and as they are graded."""
    pairs = zip(problems.problems, problems.prompts, strict=True)
    content = json.dumps([[one.id, one.problem, one.answer, list(map(int, ids))] for one, ids in pairs])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def blocks(first: int, count: int, size: int) -> list[range]:
    """The problems first..count in as few blocks of at most `size` as there must be, all nearly as long."""
    parts = -(-(count - first) // size)
    bounds = [first + (count - first) * part // parts for part in range(parts + 1)] if parts else []
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def regraded(
    generations: Generations, score: Callable[[list[str], list[str]], list[float]]
) -> tuple[Generations, int]:
    """(the same responses graded anew, how many verdicts changed); `score` takes responses and golds."""
    rows = [row for group in generations.problems for row in group]
    kind = generations.header["depends"]["reward.kind"]
    scores = score([row["response"] for row in rows], [row["answer"] for row in rows])
    anew = [
        {**row, "reward": float(np.float32(value)), "final": final_answer(row["response"], kind)}
        for row, value in zip(rows, scores, strict=True)
    ]
    changed = sum(a["reward"] != b["reward"] for a, b in zip(rows, anew, strict=True))
    groups = _in_groups(anew, generations.header["depends"]["eval.samples"])
    return Generations(generations.path, generations.header, groups), changed
