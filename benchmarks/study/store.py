"""The records of runs on disk: a file of JSONL for each task and arm, one line a run, appended when it ends.

Owns where records are, and which are missing. Must not know what a record holds besides its task, arm and
seed.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
PILOT = HERE / "pilot"

Record = dict[str, Any]
Key = tuple[str, str, int]  # task, arm, seed


def key(record: Record) -> Key:
    """What a run is known by."""
    return record["task"], record["arm"], record["seed"]


def read(folder: pathlib.Path = RESULTS) -> list[Record]:
    """All records of a folder, by task, arm and seed; a run that is there twice counts once."""
    found: dict[Key, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                record = json.loads(line)
                found.setdefault(key(record), record)
    return [found[name] for name in sorted(found)]


def read_cases(folder: pathlib.Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The cases of each task that `cases.py` has found."""
    paths = sorted((folder / "cases").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def append(record: Record, folder: pathlib.Path = RESULTS) -> None:
    """Adds a record as one line, which is on disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{record['task']}-{record['arm']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def missing(wanted: Iterable[Key], folder: pathlib.Path = RESULTS) -> list[Key]:
    """Of the wanted runs those without a record, in the order in which they are wanted."""
    there = {key(record) for record in read(folder)}
    return [name for name in wanted if name not in there]
