"""A directory that is written whole or not at all, with the files of a tokenizer beside what else it holds.

Owns when an existing directory may be replaced: only where an earlier version of this code wrote all of it.
Must not know what is written.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

from ngrpo_jax import files
from ngrpo_jax.errors import require, storage

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
GENERATION = "generation_config.json"
_RECEIPT = ".ngrpo_export.json"  # lists the files of a directory: a later one replaces only those


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a new folder, which becomes `path` where the block ends well, and is removed where it does not.

    Raises:
      UserError: `path` may not be replaced (`check_replaceable`), before the block.
    """
    target = pathlib.Path(os.path.abspath(path))
    check_replaceable(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    former = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    remove_remains(target)
    try:
        with storage(target, "written"):
            partial.mkdir(parents=True)
            yield partial
            written = sorted(file.name for file in partial.iterdir())
            files.write_json(partial / _RECEIPT, {"files": written})
            if target.exists():
                target.rename(former)
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)


def copy(sources: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
    """Copies files into a folder, under their own names."""
    for file in sources:
        shutil.copyfile(file, folder / file.name)


def remove_remains(path: str | os.PathLike) -> None:
    """Removes what writing `path` has left half-written whose process was killed, or is this one."""
    target = pathlib.Path(os.path.abspath(path))
    for kind in ("partial", "replaced"):
        for folder in target.parent.glob(f".{target.name}.{kind}-*"):
            process = folder.name.rpartition("-")[2]
            if process == str(os.getpid()) or not pathlib.Path("/proc", process).exists():
                shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(path: str | os.PathLike) -> None:
    """UserError unless `path` is absent, empty, or holds only files that `replaced` wrote there."""
    target = pathlib.Path(path)
    if not target.exists():
        return
    require(target.is_dir(), f"{target} is a file: name a directory to save to")
    present = {file.name for file in target.iterdir()} - {_RECEIPT}
    receipt = target / _RECEIPT
    known = files.read_json(receipt)["files"] if receipt.is_file() else []
    foreign = sorted(present - set(known))
    require(
        not foreign,
        f"{target} holds {', '.join(foreign)}, which no earlier save wrote there: "
        "name another directory, or empty this one",
    )


def tokenizer_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The files of `source` that go with the weights."""
    present = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    wanted = ", ".join(TOKENIZER_FILES)
    require(bool(present), f"{source} holds no tokenizer file ({wanted}): name the directory of one")
    generation = source / GENERATION
    return [*present, generation] if generation.is_file() else present
