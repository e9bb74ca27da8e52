"""TFDS data sets of this project: deepscaler, aime24, aime25, amc23, math500, gsm8k, gpqa_diamond.

`build` prepares a set from its public repository or from a file of the user's; every source "tfds:NAME" of
these names uses it. TFDS is imported in `build`, because the import is slow.
"""

import pathlib
from typing import TYPE_CHECKING

from ngrpo_jax.errors import require

from .catalogue import NAMES, configs

if TYPE_CHECKING:
    from .definitions import ProblemBuilder

__all__ = ["NAMES", "build"]


def build(
    name: str,
    *,
    data_dir: str | pathlib.Path | None = None,
    manual_dir: str | pathlib.Path | None = None,
) -> "ProblemBuilder":
    """The builder of "NAME" or "NAME/CONFIG". Prepares the set first where needed, and prints a summary.

    Args:
      data_dir: folder of the prepared sets; by default TFDS_DATA_DIR, or ~/tensorflow_datasets.
      manual_dir: a folder with the user's file (JSONL, JSON, CSV, Parquet), or the file; without it, a set
        that is not prepared is downloaded.
    Raises UserError with one sentence.
    """
    base, _, config = name.partition("/")
    require(base in NAMES, f"there is no data set {base!r}; there are {', '.join(NAMES)}")
    known = ", ".join(configs(base))
    fault = f"the data set {base} has no configuration {config!r}; it has {known}"
    require(not config or config in configs(base), fault)
    there = manual_dir is None or pathlib.Path(manual_dir).expanduser().exists()
    require(there, f"data set {name}: there is no folder {manual_dir}")
    import tensorflow_datasets as tfds

    from .definitions import BUILDERS

    tfds.disable_progress_bar()
    where = None if data_dir is None else str(pathlib.Path(data_dir).expanduser())
    builder = BUILDERS[base](config=config or None, data_dir=where)
    # For a prepared set this only compares the user's file with the file that the set was made from.
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    if builder.built_here:
        print(_summary(builder), flush=True)
    return builder


def _summary(builder: "ProblemBuilder") -> str:
    """The source of a set, its number of problems, and the number of rows left out."""
    entry, metadata = builder.entry, builder.info.metadata
    lines = [f"data set {entry.full_name}: built from {metadata['source']} ({metadata['licence']})"]
    for split, counts in metadata["splits"].items():
        line = f"  {split}: {counts['problems']} problems of {counts['rows_read']} rows of {counts['file']}"
        if entry.training:
            line += f", {counts['duplicates_dropped']} repeated and {counts['nulls_dropped']} empty left out"
        public = entry.splits[split].rows
        if public and counts["rows_read"] != public:
            line += f"; the public source has {public} rows"
        lines.append(line)
    return "\n".join(lines)
