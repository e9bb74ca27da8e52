"""The file of an evaluation's generations: one JSONL file for each data set and checkpoint step.

The first row is a header with all that the responses depend on and all that their metrics need. Each further
row is one response; the samples of a problem stand together, and problems are in the order of the data set.
Owns this format and its reading. Must not know a model: metrics follow from the file alone.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ngrpo_jax import files
from ngrpo_jax.errors import require
from ngrpo_jax.evaluation.answers import graded_responses
from ngrpo_jax.evaluation.statistics import estimates

FORMAT = 1
_HEADER = ("set", "step", "model", "problems", "pass_k", "trained", "depends")
_FIELDS = ("id", "sample", "response", "reward", "final", "tokens", "stopped")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Generations:
    """The header of a file, and the rows of each finished problem."""

    path: pathlib.Path
    header: Row
    problems: list[list[Row]]

    @property
    def label(self) -> str:
        """The name of the evaluation in a table."""
        return f"{self.header['set']}, step {self.header['step']}"

    @property
    def samples(self) -> int:
        """Responses to each problem."""
        return int(self.header["depends"]["eval.samples"])

    @property
    def reward_kind(self) -> str:
        """The `reward.kind` by which the responses were graded."""
        return self.header["depends"]["reward.kind"]

    @property
    def pass_k(self) -> tuple[int, ...]:
        """The `eval.pass_k` of the evaluation that began the file."""
        return tuple(self.header["pass_k"])

    def graded(self) -> estimates.GradedResponses:
        """The graded responses of the finished problems. UserError, naming the file, where there is none."""
        require(bool(self.problems), f"{self.path} holds no finished problem yet; evaluate continues it.")
        return graded_responses(self.problems)

    def metrics(self, pass_k: Sequence[int] | None = None) -> dict[str, estimates.Estimate]:
        """All metrics of the finished problems, for `pass_k` in the place of the file's own.

        Raises UserError, naming the file: no problem is finished, or a k is above the number of samples.
        """
        graded, wanted = self.graded(), pass_k or self.pass_k
        most = max(wanted)
        require(
            most <= self.samples,
            f"{self.path} has {self.samples} samples a problem; Pass@{most} needs {most} or more.",
        )
        return estimates.estimate_metrics(graded, wanted)

    def cosines(self) -> dict[str, float] | None:
        """Appendix E over all mixed inputs; None where nothing was mixed."""
        cosines = [value for rows in self.problems for row in rows for value in row.get("cosines", ())]
        return estimates.cosine_metrics(np.array(cosines)) if cosines else None


def read_all(paths: Sequence[pathlib.Path]) -> list[Generations]:
    """The files at these paths, and those in folders among them. UserError as of `read`, or for none."""
    found: list[pathlib.Path] = []
    for path in paths:
        inside = sorted(path.glob("generations_*.jsonl")) if path.is_dir() else [path]
        require(bool(inside), f"{path} has no generations_*.jsonl; run evaluate with --workdir={path} first.")
        found += inside
    return [read(path) for path in found]


def read(path: pathlib.Path) -> Generations:
    """The finished problems of a file.

    Raises:
      UserError: there is no such file, it is no file of generations, or one of its lines is damaged.
    """
    generations, end = read_finished(path)
    require(end > 0, f"{path} is empty; evaluate writes generations.")
    return generations


def read_finished(path: pathlib.Path) -> tuple[Generations, int]:
    """(the finished problems, where they end in the file, in bytes); a last problem may lack rows."""
    lines = list(files.read_jsonl(path, unfinished=True))
    if not lines:
        return Generations(path, {}, []), 0
    header, rows = lines[0].value, [line.value for line in lines[1:]]
    known = isinstance(header, dict) and header.get("format") == FORMAT and all(n in header for n in _HEADER)
    require(known, f"{path} line 1 is no header of generations; name a file that evaluate wrote.")
    samples = Generations(path, header, []).samples
    for index, line in enumerate(lines[1:]):
        _check(f"{path} line {line.number}", rows, index, samples)
    problems = by_problem(rows, samples)
    return Generations(path, header, problems), lines[len(problems) * samples].end


def by_problem(rows: list[Row], samples: int) -> list[list[Row]]:
    """The rows of each problem that has all its samples."""
    return [rows[stop - samples : stop] for stop in range(samples, len(rows) + 1, samples)]


def _check(place: str, rows: Sequence[Any], index: int, samples: int) -> None:
    """Refuses a row that lacks a field, or is not the next sample of its problem."""
    row = rows[index]
    missing = [name for name in _FIELDS if not isinstance(row, dict) or name not in row]
    require(not missing, f"{place} has no {', '.join(missing)}; remove the file, or that line on.")
    sample = index % samples
    expected = rows[index - sample]["id"], sample
    require(
        (row["id"], row["sample"]) == expected,
        f"{place} is sample {row['sample']} of problem {row['id']!r} where sample {sample} of "
        f"{expected[0]!r} belongs; remove the file, or that line on.",
    )
