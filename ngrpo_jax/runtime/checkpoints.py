"""Checkpoints of a run on disk, through Orbax: the latest to resume from, the best to keep.

Owns the layout of a checkpoint directory and what survives in it. Must not know what a training state or a
model is made of: a state is a tree of arrays, a model is a flat mapping of facts that has to be equal.

One checkpoint is one folder DIRECTORY/STEP with two items, `state` (arrays) and `host` (JSON: the model's
facts, the shape of every array, and whatever the caller adds). Orbax writes into a temporary folder and
renames it at the end, so a process that dies while it saves leaves no step behind.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ngrpo_jax.errors import UserError
from ngrpo_jax.runtime.mesh import path_name

Json = Any


class Checkpoints:
    """The checkpoints under one directory. Every process of the run calls every method.

    Opening one is cheap and changes nothing on disk; the first `save` makes the directory and clears what a
    killed process left half-written. Saving goes on in the background: leave the `with` block, or call
    `close`, before the process ends.

    Args:
        directory: holds one folder a step; need not exist.
        model: facts that identify the model, such as its layer count and widths (flat, JSON-able). A
            checkpoint with other facts is refused. None reads any checkpoint, and cannot save.
        best: key of the metric, larger is better, whose best checkpoint stays besides the latest; None for
            none.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: Mapping[str, Json] | None,
        best: str | None = None,
    ):
        _quiet_orbax()
        name = os.fspath(directory)
        self.directory = name if "://" in name else os.path.abspath(name)
        self._model = None if model is None else _as_json(model)
        self._best = best
        self._writes = False
        self._manager = self._open(writes=False)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, None without one."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the largest `best` metric, the newest of equals; None when none was scored by it."""
        step = self._manager.best_step() if self._best is not None else None
        if step is None:
            return None
        # Where every score on disk is of other metrics, Orbax still names one of them. None: being written.
        scores = self._manager.metrics(step)
        return step if scores is None or self._best in scores else None

    def save(
        self, step: int, state: Any, host: Mapping[str, Json], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to write a checkpoint; the arrays may be donated or changed as soon as this returns.

        Args:
            step: larger than every step saved before.
            state: pytree of jax arrays (of plain dtypes: a PRNG key goes in as its key data).
            host: JSON-able; what a resumed run needs besides arrays.
            metrics: holds the `best` metric where this step was evaluated; the others are kept too, for a
                later choice by one of them. A step without it, or with one that is not finite, is no
                candidate for the best.

        Raises:
            ValueError: the step is not newer than those on disk, or metrics lacks the `best` key.
        """
        if self._model is None:
            raise ValueError(f"{self.directory} was opened for reading; give model to save into it")
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise UserError(
                f"{self.directory} already has step {newest}, so step {step} cannot be saved; "
                f"resume from step {newest} or use another --workdir"
            )
        if not self._writes:
            self._manager.close()
            self._manager = self._open(writes=True)
            self._writes = True
        document = {"model": self._model, "shapes": _describe(state), "host": _as_json(host)}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), host=ocp.args.JsonSave(document))
        if not self._manager.save(step, args=items, metrics=self._score(metrics)):
            raise RuntimeError(f"Orbax did not save step {step} into {self.directory}")

    def read_host(self, step: int) -> dict[str, Json]:
        """The `host` of a checkpoint, read without its arrays.

        Raises:
            ValueError: the checkpoint is of another model, or damaged.
            FileNotFoundError: there is no such step.
        """
        return self._document(step)["host"]

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> tuple[Any, dict[str, Json]]:
        """Reads a checkpoint into the shapes, dtypes and shardings of `abstract`, on any mesh.

        Args:
            abstract: tree like the saved state, of jax.ShapeDtypeStruct with `sharding` (or of arrays).
            partial: read only the leaves that `abstract` has, converted to its dtypes; for programs that
                need the parameters and not the optimiser. Otherwise leaves and dtypes have to be the same.

        Returns:
            (state with the structure of `abstract`, host)

        Raises:
            ValueError: another model, other leaves or shapes (the first is named), or a damaged checkpoint;
                all but the last before any array is read.
            FileNotFoundError: there is no such step.
        """
        document = self._document(step)
        self._compare(step, document["shapes"], _describe(abstract), partial)
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, error) from error
        return restored["state"], document["host"]

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads. The object cannot be used afterwards."""
        self._manager.close()

    def _open(self, *, writes: bool) -> ocp.CheckpointManager:
        # Latest and best are two policies: `best_fn` with `max_to_keep` would delete the latest one.
        keep: list[policies.PreservationPolicy] = [policies.LatestN(1)]
        if self._best is not None:
            keep.append(policies.BestN(get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            create=writes,
            cleanup_tmp_directories=writes,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=self._rank if self._best is not None else None,  # without it no metrics are written
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _rank(self, metrics: Mapping[str, float]) -> float:
        return metrics.get(self._best or "", -math.inf)

    def _score(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        if self._best is None or metrics is None:
            return None
        if self._best not in metrics:
            raise ValueError(
                f"best is {self._best!r}, which is not among the metrics of this step: "
                + ", ".join(sorted(metrics))
            )
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        return finite if self._best in finite else None

    def _document(self, step: int) -> dict[str, Json]:
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.directory} has no checkpoint at step {step} (it has: {have})")
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))
            document = {key: restored["host"][key] for key in ("model", "shapes", "host")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(step, error) from error
        if self._model is not None and document["model"] != self._model:
            there, here = document["model"], self._model
            other = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
            raise UserError(
                f"the checkpoint at step {step} in {self.directory} is of another model "
                f"({_facts(there, other)}) than this run's ({_facts(here, other)}); "
                "use another --workdir, or the settings that made it"
            )
        return document

    def _compare(self, step: int, saved: dict[str, Json], wanted: dict[str, Json], partial: bool) -> None:
        where = f"the checkpoint at step {step} in {self.directory}"
        for name in wanted if partial else {**wanted, **saved}:
            if name not in saved:
                raise UserError(f"{where} has no {name}; it was made by other settings")
            if name not in wanted:
                raise UserError(f"{where} has {name}, which this run has not; resume by its settings")
            there, here = saved[name], wanted[name]
            if there[0] != here[0] or (there[1] != here[1] and not partial):
                raise UserError(
                    f"{where} has {name} as {there[1]}{there[0]}, this run as {here[1]}{here[0]}; "
                    "resume by the settings that made it, or use another --workdir"
                )

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return UserError(
            f"the checkpoint at step {step} in {self.directory} is damaged ({reason[:120]}); "
            f"remove the folder {self.directory}/{step} to go on from an earlier one"
        )


def _describe(tree: Any) -> dict[str, Json]:
    """Path of every leaf -> [shape, dtype], as JSON gives it back."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _as_json(value: Any) -> Json:
    """What reading `value` back from JSON gives: tuples become lists, and nobody else holds a reference."""
    return json.loads(json.dumps(value))


def _facts(model: Mapping[str, Json], keys: list[str]) -> str:
    return ", ".join(f"{key} {model.get(key)}" for key in keys)


class _OrbaxFilter(logging.Filter):
    """Drops what Orbax says below ERROR; other users of absl's logger keep their verbosity."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def _quiet_orbax() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _OrbaxFilter) for f in logger.filters):
        logger.addFilter(_OrbaxFilter())
