"""The files of a run's workdir that the report shows, read and checked. Owns their names; draws nothing."""

from dataclasses import dataclass, field
from pathlib import Path

from ngrpo_jax import files
from ngrpo_jax.errors import require
from ngrpo_jax.report import samples
from ngrpo_jax.report.samples import Row, Samples
from ngrpo_jax.runtime.metrics import read_rows


@dataclass(frozen=True)
class Run:
    """What the files of one run hold; `missing` has a sentence for each file that the workdir lacks.

    Attributes:
      rows: of metrics.jsonl.
      evaluations: of evaluations.jsonl, in order of steps.
      restarts: of restarts.jsonl: the steps from which the run was resumed.
    """

    name: str
    rows: list[Row]
    summary: Row = field(default_factory=dict)
    evaluations: list[Row] = field(default_factory=list)
    restarts: list[Row] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)
    config: Row = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def values(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was written and is finite."""
        pairs = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    @property
    def keys(self) -> list[str]:
        """Every metric that has a value in some row, in order of first appearance; held-out ones last."""
        of_steps = [k for row in self.rows for k, v in row.items() if k != "step" and v is not None]
        held_out = [f"eval/{k}" for row in self.evaluations for k, v in row.items() if isinstance(v, float)]
        return list(dict.fromkeys([*of_steps, *held_out]))


def read(workdir: Path, *, with_samples: bool = True) -> Run:
    """Reads a workdir; `with_samples` false leaves its responses out.

    Raises:
        UserError: it is no directory, metrics.jsonl is missing or has no rows, or a file is damaged; the
            sentence names the file and the line.
    """
    require(workdir.is_dir(), f"--workdir {workdir} is no directory; name the workdir of a training run.")
    path = workdir / "metrics.jsonl"
    require(path.is_file(), f"{workdir} has no metrics.jsonl; train with --workdir={workdir} first.")
    rows = read_rows(path)
    require(bool(rows), f"{path} is empty; the run has not finished a step yet.")
    missing: list[str] = []
    summary = _object(workdir / "summary.json", "the run has not ended (or was stopped)", missing)
    config = _object(workdir / "config.json", "the settings of the run are not shown", missing)
    evaluations = sorted(_rows(workdir / "evaluations.jsonl"), key=lambda row: row["step"])
    restarts = _rows(workdir / "restarts.jsonl")
    found = _samples(workdir / "samples.jsonl", missing) if with_samples else Samples()
    return Run(workdir.resolve().name, rows, summary, evaluations, restarts, found, config, missing)


def _rows(path: Path) -> list[Row]:
    """The rows of a file that earlier versions did not write."""
    return read_rows(path) if path.is_file() else []


def _object(path: Path, consequence: str, missing: list[str]) -> Row:
    if not path.is_file():
        missing.append(f"There is no {path.name}: {consequence}.")
        return {}
    return files.read_json(path, "remove it or make it again")


def _samples(path: Path, missing: list[str]) -> Samples:
    if not path.is_file():
        missing.append(f"There is no {path.name}: no responses are shown.")
        return Samples()
    found = samples.read(path)
    if not found.responses:
        missing.append(f"{path.name} is empty: no responses are shown.")
    return found
