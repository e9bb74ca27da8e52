"""The report command: pages and lists made from what other commands have written.

python -m ngrpo_jax.report --workdir=DIR                        DIR/report.html, one page about a run
python -m ngrpo_jax.report neighbors --tokens="7, the, Wait" --config=... --workdir=... [--count=8]
python -m ngrpo_jax.report pca --tokens="7, the, Wait" --config=... --workdir=...      DIR/pca.html (Figure 1)
python -m ngrpo_jax.report diversity FILE|DIR ...               how much the responses of a group differ
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ngrpo_jax.errors import UserError
from ngrpo_jax.flags import ArgumentParser
from ngrpo_jax.report.page import render
from ngrpo_jax.report.workdir import read


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the arguments, does what they ask for; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "neighbors": _neighbors,
        "pca": _pca,
        "diversity": _diversity,
    }
    try:
        if arguments and not arguments[0].startswith("-"):
            if arguments[0] not in commands:
                raise UserError(
                    f"report has no {arguments[0]!r}; it has {', '.join(commands)}, and --workdir"
                )
            commands[arguments[0]](arguments[1:])
        else:
            _page(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def write_page(path: Path, page: str) -> None:
    """Writes a page and says where; one that is being looked at is replaced whole, never half-written."""
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    print(f"{path} ({len(page.encode()) / 1024:.0f} KiB), open it in a browser")


def _page(arguments: list[str]) -> None:
    parser = ArgumentParser("python -m ngrpo_jax.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", required=True, help="folder of the run")
    workdir = parser.parse_args(arguments).workdir
    write_page(Path(workdir, "report.html"), render(read(workdir)))


# The other three read models or generations: what they import takes seconds, and the page needs none of it.


def _neighbors(arguments: list[str]) -> None:
    from ngrpo_jax.report import embeddings

    print(embeddings.neighbor_list(arguments))


def _pca(arguments: list[str]) -> None:
    from ngrpo_jax.report import embeddings

    write_page(*embeddings.plane_page(arguments))


def _diversity(arguments: list[str]) -> None:
    from ngrpo_jax.report import diversity

    parser = ArgumentParser("python -m ngrpo_jax.report diversity")
    parser.add_argument("paths", nargs="+", type=Path)
    print(diversity.table(parser.parse_args(arguments).paths))


if __name__ == "__main__":
    sys.exit(main())
