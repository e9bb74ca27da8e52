"""Our own TFDS data sets: deepscaler, aime24, aime25, amc23, math500, gsm8k, gpqa_diamond.

`build` prepares one, from its public home or from the user's file, and every source "tfds:NAME" goes through
it. TFDS is imported only then.
"""

import pathlib
from typing import TYPE_CHECKING

from ngrpo_jax.errors import UserError

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
    """The prepared builder of "NAME" or "NAME/CONFIG"; where it is not prepared yet, that is done and told.

    Args:
      data_dir: where prepared sets lie; by default TFDS_DATA_DIR, or ~/tensorflow_datasets.
      manual_dir: a folder with the user's own file (JSONL, JSON, CSV, Parquet), or the file itself; without
        it, what is not prepared is downloaded.
    Raises ValueError or OSError with one sentence.
    """
    base, _, config = name.partition("/")
    if base not in NAMES:
        raise UserError(f"no data set of ours is called {base!r}; there are {', '.join(NAMES)}")
    if config and config not in configs(base):
        raise UserError(
            f"the data set {base} has no configuration {config!r}; it has {', '.join(configs(base))}"
        )
    if manual_dir is not None and not pathlib.Path(manual_dir).expanduser().exists():
        raise UserError(f"data set {name}: there is no folder {manual_dir}")
    import tensorflow_datasets as tfds

    from .definitions import BUILDERS

    tfds.disable_progress_bar()
    where = None if data_dir is None else str(pathlib.Path(data_dir).expanduser())
    builder = BUILDERS[base](config=config or None, data_dir=where)
    # Once it is prepared this only compares the user's file with the one that it was made from.
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    if builder.built_here:
        print(_story(builder), flush=True)
    return builder


def _story(builder: "ProblemBuilder") -> str:
    """Where a set has come from, how many problems it has, and what was left out."""
    entry, facts = builder.entry, builder.info.metadata
    lines = [f"data set {entry.full_name}: built from {facts['source']} ({facts['licence']})"]
    for split, counts in facts["splits"].items():
        line = f"  {split}: {counts['problems']} problems of {counts['rows_read']} rows of {counts['file']}"
        if entry.training:
            line += f", {counts['duplicates_dropped']} repeated and {counts['nulls_dropped']} empty left out"
        public = entry.splits[split].rows
        if public and counts["rows_read"] != public:
            line += f"; the public source has {public} rows"
        lines.append(line)
    return "\n".join(lines)
