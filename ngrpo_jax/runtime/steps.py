"""The folders of checkpoints as they lie on disk: their steps, scores, checksums and damaged files.

Owns what is read of a checkpoint without Orbax, which compares no checksums and fails at a damaged score.
Another process may write and delete checkpoints meanwhile, so that every call looks anew.
"""

import asyncio
import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any

from orbax.checkpoint.path import atomicity

from ngrpo_jax.errors import UserError
from ngrpo_jax.runtime import checksums, distributed

HOST, METRICS = "host/metadata", "metrics/metrics"  # files of Orbax in a step's folder
_READ_BY_ALL = (METRICS, "_CHECKPOINT_METADATA")  # what Orbax reads of every step when it opens a directory
_REPLACED = "replaced-"  # in front of a step's number, while that step is saved again
_DELETED_S = 5.0  # how long the process that writes takes to delete a step


class DamagedError(UserError):
    """A checkpoint whose files are not as they were written."""


class ReplacedError(UserError):
    """A checkpoint that the training has deleted while it was read."""


class Summed(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder of a step, which gets its checksums last and then its name."""

    _final_path: Any

    async def finalize(self) -> None:
        """Orbax's own end, under another temporary name; the checksums of all files; the step's name."""
        final, temporary = self._final_path, self._tmp_path
        self._final_path = temporary.with_name(f"{temporary.name}.whole")
        await super().finalize()
        await asyncio.to_thread(checksums.write, pathlib.Path(self._final_path))
        self._final_path.rename(final)
        self._final_path = final


def on_disk(directory: pathlib.Path) -> list[int]:
    """The steps of a directory, oldest first."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def fault(folder: pathlib.Path) -> str | None:
    """The first damaged file of a step, such as "state/d/ab (checksum)"; None where all are whole.

    A checkpoint of a version without checksums passes. Every process calls this, and looks at a share.
    """
    this, own = distributed.process(), None
    if not _without_checksums(folder):
        own = checksums.fault(folder, share=(this.index, this.count))
    return next(filter(None, distributed.allgather("checksums", own)), None)


def newest_good(directory: pathlib.Path, steps: Iterable[int], warn: Callable[[str], None]) -> int | None:
    """The newest of these steps whose files are all whole; see Checkpoints.newest_good."""
    damaged = []
    for step in sorted(steps, reverse=True):
        found = fault(directory / str(step))
        if found is None:
            return step
        damaged.append(f"checkpoint {step} is damaged: {found}")
        warn(damaged[-1])
    if damaged:
        every = "; ".join(damaged)
        raise DamagedError(f"no checkpoint in {directory} can be used ({every}); use another --workdir")
    return None


def check(folder: pathlib.Path, name: str) -> None:
    """DamagedError where this one file of a step is not as it was written."""
    found = None if _without_checksums(folder) else checksums.fault(folder, only=(name,))
    if found is not None:
        raise damaged(folder, found)


def score(folder: pathlib.Path, best: str) -> float | None:
    """The metric `best` of a step; None where it has none. DamagedError where its file is damaged.

    A step that is being deleted, or whose deletion was cut short, has none either.
    """
    if not (folder / METRICS).exists():
        return None
    check(folder, METRICS)
    try:
        return json.loads((folder / METRICS).read_bytes()).get(best)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise damaged(folder, f"{METRICS} (no scores)") from error


def damaged(folder: pathlib.Path, found: str, *, patient: bool = True) -> UserError:
    """The error for a file at fault: damage, or a step that the training deletes in this moment.

    Args:
        patient: files that are missing may be the first that another process deletes: waits for the rest.
    """
    end = time.monotonic() + (_DELETED_S if patient and not found.endswith("(checksum)") else 0)
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    if not folder.exists():
        return ReplacedError(f"the training has replaced {folder} meanwhile; take another --step")
    return DamagedError(f"checkpoint {folder.name} is damaged: {found}; the folder is {folder}")


def set_aside(directory: pathlib.Path, after: int) -> None:
    """Renames the folders of steps beyond `after`, and those that Orbax could not open, to damaged-STEP.

    An older one of which files are missing was being deleted when its process was killed: it is deleted.
    """
    for step in on_disk(directory):
        folder = directory / str(step)
        found = None if _without_checksums(folder) else checksums.fault(folder, only=_READ_BY_ALL)
        if step < after and found is not None and found.endswith("(missing)"):
            shutil.rmtree(folder)
        elif step > after or found is not None:
            target = folder.with_name(f"damaged-{step}")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


def step_aside(directory: pathlib.Path, step: int) -> None:
    """Renames the folder of a step to replaced-STEP, where `put_back` finds it."""
    (directory / str(step)).rename(directory / f"{_REPLACED}{step}")


def put_back(directory: pathlib.Path) -> None:
    """Gives a step that was to be replaced its name again, or deletes it where the new one is there."""
    for old in directory.glob(f"{_REPLACED}*"):
        new = directory / old.name.removeprefix(_REPLACED)
        if new.exists():
            shutil.rmtree(old)
        else:
            old.rename(new)


def _without_checksums(folder: pathlib.Path) -> bool:
    """Whether a version made this step that kept no checksums: its document does not promise any."""
    if (folder / checksums.NAME).exists():
        return False
    with contextlib.suppress(ValueError, OSError):
        document = json.loads((folder / HOST).read_bytes())
        return isinstance(document, dict) and "checksums" not in document
    return False
