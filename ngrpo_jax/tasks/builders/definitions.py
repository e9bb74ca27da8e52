"""The data sets of the catalogue as TFDS builders, written as array_record and read without TensorFlow.

Imported by `builders.build` alone, because the import of TFDS takes half a second. The builders are not
registered with TFDS, which has a gsm8k of its own and fails to list its sets when two have the same name.
"""

import contextlib
import fcntl
import hashlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from ngrpo_jax.errors import UserError

from . import catalogue, hub, reading

_TEXT = tfds.features.Text()


class ProblemBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A set of problems from its public repository, or from the file in `DownloadConfig.manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    code_path = None  # no checksum files; to look for them, TFDS needs a package that it does not install

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any):
        self._own: pathlib.Path | None = None
        self.built_here = False  # True after this process has prepared the set
        super().__init__(file_format=file_format, **kwargs)

    @property
    def entry(self) -> catalogue.DataSet:
        """The entry of the catalogue for this configuration."""
        return catalogue.configs(self.name)[self.builder_config.name]

    def download_and_prepare(self, *, download_config: Any = None, **kwargs: Any) -> None:
        """As in TFDS, but with a lock for each set; a set that another process has prepared is used as it is.

        Raises UserError where the set was prepared from another file than that of `manual_dir`.
        """
        given = download_config.manual_dir if download_config else None
        self._own = None if given is None else pathlib.Path(given).expanduser()
        with _alone(pathlib.Path(self.data_dir)):
            if self.data_path.exists():
                self.info.read_from_directory(self.data_path)
                self._check_origin()
            else:
                super().download_and_prepare(download_config=download_config, **kwargs)
                self.built_here = True

    def _log_download_bytes(self) -> None:
        """Prints nothing: the sizes are unknown to TFDS. `builders.build` prints a summary."""

    _log_download_done = _log_download_bytes

    def _info(self) -> tfds.core.DatasetInfo:
        entry = self.entry
        home = f"https://huggingface.co/datasets/{entry.repository}" if entry.repository else ""
        return tfds.core.DatasetInfo(
            builder=self,
            description=entry.title,
            features=tfds.features.FeaturesDict({"id": _TEXT, "problem": _TEXT, "answer": _TEXT}),
            homepage=home,
            license=entry.licence,
            disable_shuffling=True,  # the file's order
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        # Everything is read and checked here: TFDS wraps what the generator of examples raises.
        entry, own = self.entry, self._own
        paths = reading.own_files(entry, own) if own else hub.fetch(entry)
        read = {split: reading.read_split(entry, split, paths[split], public=not own) for split in paths}
        named = dict.fromkeys(licence for split in read.values() for licence in split.licences)
        self.info.metadata.update(
            source="own file" if own else f"huggingface.co/datasets/{entry.repository}@{entry.revision}",
            licence="; ".join(named) if own and named else entry.licence,
            kind=entry.kind,
            splits={split: rows.metadata for split, rows in read.items()},
        )
        return {split: self._generate_examples(rows.examples) for split, rows in read.items()}

    def _generate_examples(self, examples: list[dict[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(examples)

    def _check_origin(self) -> None:
        if self._own is None:
            return
        made = {split: recorded["sha256"] for split, recorded in self.info.metadata["splits"].items()}
        for split, path in reading.own_files(self.entry, self._own).items():
            if hashlib.sha256(path.read_bytes()).hexdigest() != made.get(split):
                raise UserError(
                    f"the data set {self.entry.full_name} in {self.data_dir} was built from another file "
                    f"than {path}; delete that folder, or give another data_dir"
                )


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[None]:
    """Holds a file lock for `directory`, which the kernel releases even where the process is killed."""
    *_, name, config, version = directory.parts
    root = directory.parents[2]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}-{config}-{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in directory.parent.glob(f"incomplete.*_{directory.name}"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield


def _builder(name: str) -> type[ProblemBuilder]:
    """The builder class of a data set of the catalogue, with its configurations."""
    entries = catalogue.configs(name)
    configs = [tfds.core.BuilderConfig(name=key, description=entry.title) for key, entry in entries.items()]
    body = {"name": name, "BUILDER_CONFIGS": configs, "__module__": __name__}
    title = name.title().replace("_", "")
    return type(title, (ProblemBuilder,), body, skip_registration=True)


BUILDERS = {name: _builder(name) for name in catalogue.NAMES}
