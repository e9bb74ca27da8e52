"""python -m ngrpo_jax.report --workdir=DIR: makes DIR/report.html from what a run has written."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ngrpo_jax.report.page import render
from ngrpo_jax.report.workdir import read


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the arguments, writes the page, prints where it is; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ngrpo_jax.report", description="One page about a run.")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    workdir = parser.parse_args(argv).workdir
    try:
        page = render(read(workdir))
        path = Path(workdir, "report.html")
        # A page that is being looked at is replaced whole, never half-written.
        temporary = path.with_suffix(".html.tmp")
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({len(page.encode()) / 1024:.0f} KiB), open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
