"""The files of a run's workdir that the report shows, read and checked. Owns their names; draws nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngrpo_jax import files
from ngrpo_jax.errors import require
from ngrpo_jax.runtime.metrics import read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the files of one run hold; `missing` has a sentence for each file that the workdir lacks."""

    name: str
    rows: list[Row]
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def values(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was written and is finite."""
        pairs = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    @property
    def keys(self) -> list[str]:
        """Every metric that has a value in some row, in order of first appearance."""
        return list(
            dict.fromkeys(k for row in self.rows for k, v in row.items() if k != "step" and v is not None)
        )


def read(workdir: Path) -> Run:
    """Reads a workdir.

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
    samples = _samples(workdir / "samples.jsonl", "no responses are shown", missing)
    return Run(workdir.resolve().name, rows, summary, samples, config, missing)


def _object(path: Path, consequence: str, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append(f"There is no {path.name}: {consequence}.")
        return {}
    return files.read_json(path, "remove it or make it again")


def _samples(path: Path, consequence: str, missing: list[str]) -> list[Row]:
    if not path.is_file():
        missing.append(f"There is no {path.name}: {consequence}.")
        return []
    samples = []
    for line in files.read_jsonl(path, unfinished=True):
        response = line.value.get("response") if isinstance(line.value, dict) else None
        fault = f"{path} line {line.number} has no `response` text; remove that line."
        require(isinstance(response, str), fault)
        samples.append(line.value)
    if not samples:
        missing.append(f"{path.name} is empty: {consequence}.")
    return samples
