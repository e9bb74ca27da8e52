"""Checkpoints of a run on disk, through Orbax: the latest ones, to resume from, the best, and some for good.

Owns the layout of a checkpoint directory and which checkpoints stay in it. Must not know what a training
state or a model consists of: a state is a tree of arrays, a model's identity a flat mapping.

One checkpoint is one folder DIRECTORY/STEP with two items: `state` (arrays) and `host` (JSON: the model's
identity, the shape of every array, and what the caller adds), and the checksums of all files. Orbax writes
into a temporary folder and renames it at the end, so that a process that dies while it saves leaves no step.
"""

import contextlib
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ngrpo_jax.errors import StorageError, UserError, is_storage_failure, require
from ngrpo_jax.files import as_json
from ngrpo_jax.runtime import distributed, steps
from ngrpo_jax.runtime.mesh import path_name

Json = Any


class Checkpoints:
    """The checkpoints under one directory. Every process of the run calls every method.

    Opening a directory changes nothing on disk; the first `save` makes it and removes what a killed process
    left half-written. Arrays are written in the background: leave the `with` block, or call `close`, before
    the process ends.

    Args:
        directory: holds one folder a step; need not exist.
        model: the model's identity, such as its layer count and widths (flat, JSON-able). A checkpoint of a
            model with another identity is refused. None reads any checkpoint, and cannot save.
        best: name of the metric, larger is better, whose best checkpoint stays besides the latest; None: only
            the latest stay.
        keep: how many of the latest stay.
        keep_every: steps that are multiples of this number stay for good; None: no others.
        any_model: whether checkpoints of a model with another identity are read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: Mapping[str, Json] | None,
        best: str | None = None,
        keep: int = 1,
        keep_every: int | None = None,
        any_model: bool = False,
    ) -> None:
        logging.getLogger("absl").addFilter(_is_shown)  # the same filter twice counts once
        name = os.fspath(directory)
        self.directory = name if "://" in name else os.path.abspath(name)
        self._model = None if model is None else as_json(model)
        self._path = pathlib.Path(self.directory)
        self._any_model = any_model
        self._best, self._keep, self._keep_every = best, keep, keep_every
        # A manager reads the scores of all steps when it is opened, also where one of them is damaged.
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._manager: ocp.CheckpointManager | None = None  # until something is written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps on disk, oldest first, also those that another process has written meanwhile."""
        return steps.on_disk(self._path) if self._manager is None else sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, None without one."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the largest `best` metric, the newest of equals; None where none has it."""
        if self._best is None:
            return None
        if self._manager is None:
            scores = [(steps.score(self._path / str(step), self._best), step) for step in self.steps()]
            return max(((value, step) for value, step in scores if value is not None), default=(0, None))[1]
        step = self._manager.best_step()
        if step is None:
            return None
        # Orbax names a step even where all steps on disk have other metrics. None: it is being written.
        metrics = self._manager.metrics(step)
        return step if metrics is None or self._best in metrics else None

    def newest_good(self, warn: Callable[[str], None]) -> int | None:
        """The newest step whose files are all as they were written, None without a checkpoint.

        Args:
            warn: gets a sentence for each newer step, which names the damaged file.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        return steps.newest_good(self._path, self.steps(), warn)

    def go_on_from(self, step: int) -> None:
        """Makes room for the steps after `step`: newer ones, which are damaged, are renamed damaged-STEP."""
        if distributed.process().primary:
            steps.set_aside(self._path, step)
        distributed.allgather("damaged checkpoints are set aside", None)

    def holds(self, step: int) -> bool:
        """Whether a step is on disk whole, and not still written."""
        return (self._path / str(step)).exists()

    def replace(self, step: int, save: Callable[[], None]) -> None:
        """Calls `save`, which saves a step that is there already, and waits until it is on disk.

        The old one stays until then: the next `put_back` brings it back should this process be killed.
        """
        self.wait()
        if distributed.process().primary:
            steps.step_aside(self._path, step)
        distributed.allgather("the step that is saved again is set aside", None)
        self._writer().reload()
        save()
        self.wait()
        self.put_back()

    def put_back(self) -> None:
        """Ends what was begun by `replace`, here or in a process that was killed."""
        if distributed.process().primary:
            steps.put_back(self._path)
        distributed.allgather("replaced checkpoints are put back", None)

    def save(
        self, step: int, state: Any, host: Mapping[str, Json], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to write a checkpoint; the arrays may be donated or changed as soon as this returns.

        Args:
            step: larger than every step saved before.
            state: pytree of jax arrays of plain dtypes (a PRNG key goes in as its key data).
            host: JSON-able; what a resumed run needs besides arrays.
            metrics: of the evaluation of this step, the `best` metric among them; None where there was none.
                All are stored, so that another metric can choose later. A step without the `best` metric, or
                where it is not finite, cannot be the best.

        Raises:
            UserError: the directory has this step or a newer one.
            StorageError: this checkpoint, or the one before in the background, could not be written.
            ValueError: `metrics` lacks the `best` metric.
        """
        if self._model is None:
            raise ValueError(f"{self.directory} was opened for reading; give model to save into it")
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise UserError(
                f"{self.directory} already has step {newest}, so step {step} cannot be saved; "
                f"resume from step {newest} or use another --workdir"
            )
        manager = self._writer()
        document = {
            "model": self._model,
            "shapes": _describe(state),
            "host": as_json(host),
            "checksums": True,
        }
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), host=ocp.args.JsonSave(document))
        with self._written():
            saved = manager.save(step, args=items, metrics=self._ranked(metrics))
        if not saved:
            raise RuntimeError(f"Orbax did not save step {step} into {self.directory}")

    def read_host(self, step: int) -> dict[str, Json]:
        """The `host` of a checkpoint, read without its arrays.

        Raises:
            UserError: there is no such step, it is of another model, or it is damaged.
            StorageError: it cannot be read.
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
            UserError: there is no such step; it is of another model, has other leaves or shapes (the first is
                named), or is damaged (`DamagedError`, which names the file). All is found before any array is
                restored.
            ReplacedError: another process has deleted it meanwhile.
            StorageError: it cannot be read.
        """
        document = self._document(step)
        self._compare(step, document["shapes"], _describe(abstract), partial)
        fault = steps.fault(self._path / str(step))
        if fault is not None:
            raise self._damaged(step, fault)
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        try:
            restored = self._reader.restore(self._path / str(step), ocp.args.Composite(state=arguments))
        except Exception as error:
            raise self._unreadable(step, error) from error
        return restored["state"], document["host"]

    def wait(self) -> None:
        """Blocks until every saved checkpoint is on disk. StorageError where one could not be written."""
        with self._written():
            if self._manager is not None:
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads. The object cannot be used afterwards."""
        self._reader.close()
        with self._written():
            if self._manager is not None:
                self._manager.close()

    def _writer(self) -> ocp.CheckpointManager:
        """Orbax's manager; opening it makes the directory, and removes what is half-written there."""
        if self._manager is not None:
            return self._manager
        # Latest and best are two policies: `best_fn` with `max_to_keep` would delete the latest one.
        keep: list[policies.PreservationPolicy] = [policies.LatestN(self._keep)]
        if self._keep_every is not None:
            keep.append(policies.EveryNSteps(self._keep_every))
        if self._best is not None:
            keep.append(policies.BestN(get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=self._rank if self._best is not None else None,  # None: Orbax writes no metrics
            temporary_path_class=steps.Summed,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _rank(self, metrics: Mapping[str, float]) -> float:
        return metrics.get(self._best or "", -math.inf)

    def _ranked(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        """The finite metrics of a step that can be the best; None for other steps."""
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
        have = ", ".join(map(str, self.steps())) or "none"
        require(step in self.steps(), f"{self.directory} has no checkpoint at step {step} (it has: {have})")
        steps.check(self._path / str(step), steps.HOST)
        try:
            arguments = ocp.args.Composite(host=ocp.args.JsonRestore())
            restored = self._reader.restore(self._path / str(step), arguments)
            document = {key: restored["host"][key] for key in ("model", "shapes", "host")}
        except Exception as error:
            raise self._unreadable(step, error) from error
        saved, own = document["model"], self._model
        # A name that is not in the checkpoint was not stored yet by the version that made it.
        differ = [] if own is None else [name for name in sorted(saved) if saved[name] != own.get(name)]
        if own is not None and differ and not self._any_model:
            raise UserError(
                f"the checkpoint at step {step} in {self.directory} is of another model "
                f"({_entries(saved, differ)}) than this run's ({_entries(own, differ)}); "
                "use another --workdir, or the settings that made it"
            )
        return document

    def _compare(self, step: int, saved: dict[str, Json], wanted: dict[str, Json], partial: bool) -> None:
        where = f"the checkpoint at step {step} in {self.directory}"
        for name in wanted if partial else {**wanted, **saved}:
            require(name in saved, f"{where} has no {name}; it was made by other settings")
            require(name in wanted, f"{where} has {name}, which this run has not; resume by its settings")
            (shape, dtype), (own_shape, own_dtype) = saved[name], wanted[name]
            if shape != own_shape or (dtype != own_dtype and not partial):
                raise UserError(
                    f"{where} has {name} as {dtype}{shape}, this run as {own_dtype}{own_shape}; "
                    "resume by the settings that made it, or use another --workdir"
                )

    def _unreadable(self, step: int, error: Exception) -> Exception:
        """What to raise where Orbax fails to read a step: storage, damage, or the error itself (a bug)."""
        if is_storage_failure(_system_error(error)):
            return StorageError(f"{self.directory}/{step} cannot be read: {_first_line(error)}.")
        # Orbax raises a plain Exception for an array that is cut off.
        damage = isinstance(error, OSError | ValueError | KeyError | TypeError) or type(error) is Exception
        return self._damaged(step, _first_line(error)) if damage else error

    def _damaged(self, step: int, fault: str) -> UserError:
        return steps.damaged(self._path / str(step), fault, patient=self._manager is None)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turns a failure of storage while a checkpoint is written into a StorageError."""
        try:
            yield
        except Exception as error:
            if not is_storage_failure(_system_error(error)):
                raise
            raise StorageError(
                f"a checkpoint cannot be written to {self.directory}: {_first_line(_system_error(error))}."
            ) from error


def _system_error(error: Exception) -> Exception:
    """The error of the operating system that TensorStore puts into the text of its own; else `error`."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _describe(tree: Any) -> dict[str, Json]:
    """Path of every leaf -> [shape, dtype], as read from JSON."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _entries(model: Mapping[str, Json], names: list[str]) -> str:
    return ", ".join(f"{name} {model.get(name)}" for name in names)


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a log record is not of Orbax, which raises what it logs as an error too, with its traceback."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname
