"""Makes the pictures of README and docs: parts of the report's pages, as a browser draws them.

    python -m docs.pictures --run=WORKDIR --pretrained=WORKDIR --against=SWEEP [--chromium=PATH] [--out=DIR]

`--run` is a run of configs/tiny.py, `--pretrained` one of configs/smollm2.py, `--against` the folder of a
sweep over mixing.rate and seeds; one of them alone does. Run it from the root of the repository. It needs
Chromium; neither tests nor CI need this script.
"""

import argparse
import pathlib
import subprocess
import tempfile
from typing import NamedTuple

from ngrpo_jax.report import compare
from ngrpo_jax.report.__main__ import found_workdirs
from ngrpo_jax.report.page import render
from ngrpo_jax.report.workdir import read

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
    "--virtual-time-budget=5000",
)
WIDTH = 1180  # CSS pixels
MOST_BYTES = 200_000

# Keeps the elements of the page from the one that FIRST selects to the last before END, then runs STEPS.
SCRIPT = """<script>
{
const parts = [...document.querySelector("main").children];
const at = (selector) => parts.findIndex((part) => part.matches(selector));
const [first, end] = [FIRST, END].map((selector) => (selector === null ? -1 : at(selector)));
parts.forEach((part, i) => { if (i < first || (end >= 0 && i >= end)) part.style.display = "none"; });
document.querySelector("main").style.paddingTop = "1rem";
document.querySelector("h2").style.marginTop = "0";
STEPS
}
</script>"""
HOVER = """
const marks = [...document.querySelectorAll("#rollout-list mark")].slice(0, 4);
const spread = (mark) => 1 - Math.max(...(mark.mixture[1] ?? [0, 1]).filter((_, i) => i % 2));
const mark = marks.sort((a, b) => spread(b) - spread(a))[0];
mark.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
mark.style.background = "var(--mark)";
"""


class Picture(NamedTuple):
    """A part of a page: its file, its height, selectors of its first element and of the first after it."""

    name: str
    height: int
    first: str | None = None
    end: str | None = None
    steps: str = ""


OF_RUN = (
    Picture("run", 900, end="#rollouts"),
    Picture("rollouts", 760, "#rollouts", "#responses", HOVER),
)
OF_PRETRAINED = (
    Picture("smollm2", 900, end="#rollouts"),
    Picture("mixed", 610, "#what-was-mixed", "#held-out-problems"),
)
OF_SWEEP = (Picture("against", 1000, end="#responses"),)


def main() -> None:
    """Writes the pictures, and prints the size of each."""
    parser = argparse.ArgumentParser(prog="python -m docs.pictures")
    parser.add_argument("--run", type=pathlib.Path)
    parser.add_argument("--pretrained", type=pathlib.Path)
    parser.add_argument("--against", type=pathlib.Path)
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "pictures")
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    pages = []
    if given.run:
        pages.append((render(read(given.run)), OF_RUN))
    if given.pretrained:
        pages.append((render(read(given.pretrained)), OF_PRETRAINED))
    if given.against:
        runs = [read(one, with_samples=False) for one in found_workdirs([str(given.against / "*")])]
        pages.append((compare.render(runs), OF_SWEEP))
    for page, pictures in pages:
        for picture in pictures:
            path = given.out / f"{picture.name}.png"
            draw(page, picture, path, given.chromium)
            size = path.stat().st_size
            print(f"{path} {size / 1000:.0f} kB{' (too large)' if size > MOST_BYTES else ''}")


def draw(page: str, picture: Picture, path: pathlib.Path, chromium: str) -> None:
    """Writes one picture of a page."""
    script = SCRIPT.replace("STEPS", picture.steps)
    for name, selector in (("FIRST", picture.first), ("END", picture.end)):
        script = script.replace(name, "null" if selector is None else f'"{selector}"')
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "page.html"
        file.write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
        window = f"--window-size={WIDTH},{picture.height}"
        profile = f"--user-data-dir={folder}/profile"
        command = [chromium, *FLAGS, window, profile, f"--screenshot={path.resolve()}", file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
