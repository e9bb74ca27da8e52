"""The report command: pages and lists made from what other commands have written.

python -m ngrpo_jax.report --workdir=DIR                        DIR/report.html, one page about a run
python -m ngrpo_jax.report --workdir=DIR --serve [--port=8000]  the same at a local address, as the run grows
python -m ngrpo_jax.report compare DIR DIR ... [--out=FILE]     several runs side by side: ./compare.html
python -m ngrpo_jax.report neighbors --tokens="7, the, Wait" --workdir=DIR [--count=8]
python -m ngrpo_jax.report pca --tokens="7, the, Wait" --workdir=DIR    DIR/pca.html (Figure 1)
python -m ngrpo_jax.report diversity FILE|DIR ...               how much the responses to a problem differ
"""

import glob
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from ngrpo_jax import files, flags
from ngrpo_jax.errors import require
from ngrpo_jax.report import serve
from ngrpo_jax.report.page import render
from ngrpo_jax.report.workdir import read


def main(argv: Sequence[str]) -> None:
    """Writes the page of a run, or what the subcommand in the first argument names."""
    program, *arguments = argv
    if not arguments or arguments[0].startswith("-"):
        _page(arguments)
        return
    name, *rest = arguments
    require(name in _SUBCOMMANDS, f"report has no {name!r}; it has {', '.join(_SUBCOMMANDS)}, and --workdir.")
    _SUBCOMMANDS[name]([f"{program} {name}", *rest])


def write_page(path: Path, page: str) -> None:
    """Replaces the file by the page and prints where it is."""
    files.write_text(path, page)
    print(f"{path} ({len(page.encode()) / 1024:.0f} KiB), open it in a browser")


def _page(arguments: Sequence[str]) -> None:
    parser = flags.ArgumentParser("python -m ngrpo_jax.report")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(arguments)

    def page() -> str:
        return render(read(given.workdir))

    if given.serve:
        serve.serve(given.workdir, page, given.port)
    else:
        write_page(given.workdir / "report.html", page())


# The subcommands import what reads models and generations, which takes seconds that the page does not need.


def _neighbors(argv: Sequence[str]) -> None:
    from ngrpo_jax.report import embeddings

    print(embeddings.neighbor_list(argv))


def _pca(argv: Sequence[str]) -> None:
    from ngrpo_jax.report import embeddings

    write_page(*embeddings.plane_page(argv))


def _compare(argv: Sequence[str]) -> None:
    from ngrpo_jax.report import compare

    parser = flags.ArgumentParser("python -m ngrpo_jax.report compare")
    parser.add_argument("workdirs", nargs="*")
    parser.add_argument("--workdir", action="append", default=[])
    parser.add_argument("--out", default="compare.html", type=Path)
    given = parser.parse_args(argv[1:])
    workdirs = found_workdirs([*given.workdirs, *given.workdir])
    runs = [read(workdir, with_samples=False) for workdir in workdirs]
    pages = [workdir / "report.html" for workdir in workdirs]
    links = [
        urllib.parse.quote(os.path.relpath(page, given.out.parent)) if page.is_file() else ""
        for page in pages
    ]
    write_page(given.out, compare.render(runs, links))


def found_workdirs(patterns: Sequence[str]) -> list[Path]:
    """The workdirs that these paths and globs name, each once. UserError where one names nothing."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern))
        require(bool(matches), f"{pattern} is no workdir; name workdirs of training runs, or a glob of them.")
        # A folder of a sweep has a workdir for each of its runs, beside logs and other folders. The shell
        # may have expanded a glob, so that a file is no mistake, while a folder by its own name must be one.
        found += [path for path in map(Path, matches) if _may_be_run(path, named=str(path) == pattern)]
    require(len(found) > 1, "compare needs two workdirs or more: report compare DIR DIR.")
    return list(dict.fromkeys(found))


def _may_be_run(path: Path, *, named: bool) -> bool:
    return (path / "metrics.jsonl").is_file() or (named and not path.is_file())


def _diversity(argv: Sequence[str]) -> None:
    from ngrpo_jax.report import diversity

    parser = flags.ArgumentParser("python -m ngrpo_jax.report diversity")
    parser.add_argument("paths", nargs="+", type=Path)
    print(diversity.table(parser.parse_args(argv[1:]).paths))


_SUBCOMMANDS = {"compare": _compare, "neighbors": _neighbors, "pca": _pca, "diversity": _diversity}


def cli() -> None:
    """The console script ngrpo-report."""
    flags.run_command(main)


if __name__ == "__main__":
    cli()
