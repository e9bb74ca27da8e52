"""Writes the generations of an evaluation, and continues the file of one that was interrupted.

Owns what a file's header and rows hold, and the rule that only the same evaluation may continue a file.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from ngrpo_jax.errors import require, storage
from ngrpo_jax.evaluation.answering import Responses
from ngrpo_jax.evaluation.answers import final_answer
from ngrpo_jax.evaluation.generations import FORMAT, Row, read_finished
from ngrpo_jax.evaluation.sets import EvalSet
from ngrpo_jax.evaluation.statistics import paper
from ngrpo_jax.files import as_json
from ngrpo_jax.setup.problems import ProblemSet


def generations_path(folder: pathlib.Path, step: int, name: str) -> pathlib.Path:
    """The file of a checkpoint step's generations on a data set."""
    return folder / f"generations_{step}_{name}.jsonl"


def make_header(eval_set: EvalSet, problems: ProblemSet, step: int, weights: str) -> Row:
    """The header of an evaluation: under `depends`, leaf by leaf, all that its responses are a function of.

    `weights`: the digest of the parameters, from `setup.model_spec.model_identity`.
    """
    settings, leaves = eval_set.settings, eval_set.settings.leaves()
    mixing = [name for name in leaves if name.startswith("mixing.") and settings.eval.mixing]
    depends = {"set": eval_set.name, "step": step, "seed": settings.seed, "weights": weights}
    depends |= {"model.dtype": settings.model.dtype, "problems": _digest(problems)}
    depends |= {name: leaves[name] for name in (*paper.SAMPLING, "eval.mixing", *mixing, "reward.kind")}
    trained = {leaf: leaves[f"mixing.{leaf}"] for leaf in ("strategy", "rate", "metric", *paper.NEIGHBOR)}
    header = {
        "format": FORMAT,
        "set": eval_set.name,
        "step": step,
        "source": settings.data.eval,
        "model": settings.model.path,
        "problems": len(problems.problems),
        "too_long": problems.dropped,
        "pass_k": list(settings.eval.pass_k),
        "trained": {**trained, "algorithm": settings.objective.algorithm},
        "depends": depends,
    }
    return as_json(header)


def response_rows(
    responses: Responses,
    problems: ProblemSet,
    indices: Sequence[int],
    kind: str,
    cosines: tuple[np.ndarray, np.ndarray] | None,
) -> list[Row]:
    """One row for each response to the problems at `indices`.

    Args:
      kind: `reward.kind`, by which final answers are read.
      cosines: (positions, values) of `cosines.mixed_cosines`; None where the evaluation does not mix.
    """
    trajectories, samples = responses.trajectories, responses.rewards_PG.shape[1]
    rows = []
    for index, text in enumerate(responses.texts):
        problem = problems.problems[indices[index // samples]]
        tokens = trajectories.response(index)
        row = {
            "id": problem.id,
            "problem": problem.problem,
            "answer": problem.answer,
            "sample": index % samples,
            "response": text,
            "final": final_answer(text, kind),
            "reward": float(responses.rewards_PG.reshape(-1)[index]),
            "tokens": len(tokens),
            "stopped": bool(trajectories.stopped_B[index]),
            "token_ids": tokens.tolist(),
            "mixed_at": np.flatnonzero(trajectories.mixed_BT[index, : len(tokens)]).tolist(),
        }
        if cosines is not None:
            positions, values = cosines
            row["cosines"] = [round(float(value), 6) for value in values[positions[:, 0] == index]]
        rows.append(row)
    return rows


class GenerationsWriter:
    """Appends the rows of whole problems to a file of generations; continues a file of the same evaluation.

    Attributes:
      path: the file.
      finished: problems that it holds.

    Raises UserError where the file holds another evaluation.
    """

    def __init__(self, path: pathlib.Path, header: Row):
        self.path, self.finished = path, 0
        self._header, self._end = header, 0  # bytes up to the end of the last finished problem
        if not path.exists():
            return
        found, self._end = read_finished(path)
        self.finished = len(found.problems)
        if self._end:
            _check_same(path, found.header["depends"], header["depends"])

    def append(self, rows: Sequence[Row]) -> None:
        """Adds the rows of whole problems, over those of an unfinished one; they are on disk on return."""
        lines = [*rows] if self._end else [self._header, *rows]
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines).encode()
        with storage(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._end)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._end += len(data)
        self.finished += len(rows) // self._header["depends"]["eval.samples"]


def _check_same(path: pathlib.Path, there: Row, here: Row) -> None:
    changed = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    differences = "; ".join(f"{name} {there.get(name)}, not {here.get(name)}" for name in changed)
    require(
        not changed,
        f"{path} was made with {differences}; use those, remove the file, or name another --generations=DIR.",
    )


def _digest(problems: ProblemSet) -> str:
    """A digest of the problems, their prompts' tokens, and their gold answers."""
    pairs = zip(problems.problems, problems.prompts, strict=True)
    content = json.dumps([[one.id, one.problem, one.answer, list(map(int, ids))] for one, ids in pairs])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
