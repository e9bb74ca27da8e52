"""What a workdir holds for the report, read and checked. Owns the files' names; draws nothing."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngrpo_jax.errors import UserError
from ngrpo_jax.runtime.metrics import read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: `missing` says in sentences what the workdir did not have."""

    name: str
    rows: list[Row]
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def values(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was written and finite."""
        pairs = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    @property
    def keys(self) -> list[str]:
        """Every metric that has a value somewhere, in order of first appearance."""
        return list(
            dict.fromkeys(k for row in self.rows for k, v in row.items() if k != "step" and v is not None)
        )


def read(workdir: str | os.PathLike[str]) -> Run:
    """Reads a workdir.

    Raises:
        FileNotFoundError: no such directory, or it has no metrics.jsonl.
        ValueError: metrics.jsonl has no rows, or a file is not what its name says; file and line are named.
    """
    directory = Path(workdir)
    if not directory.is_dir():
        raise UserError(f"--workdir {workdir} is no directory; name the workdir of a training run")
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{directory} has no metrics.jsonl; train with --workdir={directory} first")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} is empty; the run has not finished a step yet")
    missing: list[str] = []
    summary = _object(directory / "summary.json", "the run has not ended (or was stopped)", missing)
    config = _object(directory / "config.json", "the settings of the run are not shown", missing)
    samples = _samples(directory / "samples.jsonl", "no responses are shown", missing)
    return Run(directory.resolve().name, rows, summary, samples, config, missing)


def _object(path: Path, consequence: str, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append(f"There is no {path.name}: {consequence}.")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it or make it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; remove it or make it again")
    return found


def _samples(path: Path, consequence: str, missing: list[str]) -> list[Row]:
    if not path.is_file():
        missing.append(f"There is no {path.name}: {consequence}.")
        return []
    samples = []
    # Not splitlines(), which also cuts at U+2028 in a response; what follows the last newline is unfinished.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg}); remove that line") from error
        if not isinstance(row, dict) or not isinstance(row.get("response"), str):
            raise UserError(f"{path} line {number} has no `response` text; remove that line")
        samples.append(row)
    if not samples:
        missing.append(f"{path.name} is empty: {consequence}.")
    return samples
