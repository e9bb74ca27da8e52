"""The page in a real browser: no error, nothing wider than the screen; hover, search and filter at work.

Needs Chromium, by the name `chromium` on PATH or that of NGRPO_CHROMIUM; without, these tests are left out. A
copy of the page drives itself (tests/browser/): what it finds replaces its content, which the browser prints.
A headless window has a least width, so the page is shown in a frame of the width that is asked for.
"""

import html
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from ngrpo_jax.report import compare
from ngrpo_jax.report.page import render
from ngrpo_jax.report.workdir import read

CHROMIUM = os.environ.get("NGRPO_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

PARTS = pathlib.Path(__file__).parent / "browser"
EVIL = "</script><script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--dump-dom")
FRAMED = ("--allow-file-access-from-files", "--disable-web-security", "--virtual-time-budget=20000")


def _part(name):
    return (PARTS / name).read_text(encoding="utf-8")


def _browse(page, folder, steps, width=1280):
    end = _part("end.html").replace("STEPS", steps)
    page = page.replace("<main>", _part("start.html") + "<main>", 1).replace("</body>", end + "</body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(_part("frame.html").replace("WIDTH", str(width)))
    command = [CHROMIUM, *FLAGS, *FRAMED, f"--user-data-dir={folder / 'profile'}", str(folder / "frame.html")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return json.loads(html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", printed, re.DOTALL)[1]))


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _workdir(folder, rate=0.1):
    """A run of eight steps with two evaluations and one group of responses, one right and three wrong."""
    folder.mkdir()
    of_step = {"time/rollout": 2.0, "time/update": 1.0, "gap/mean": 1e-6}
    _write(folder / "metrics.jsonl", [{"step": n, "reward/mean": 0.1 * n, **of_step} for n in range(1, 9)])
    evaluations = [
        {
            "step": step,
            "mean_at_n": value,
            "intervals": {"mean_at_n": [value - 0.1, value + 0.1]},
            "samples": 4,
            "correct": {"a": count, "b": 0},
        }
        for step, value, count in ((0, 0.2, 1), (8, 0.5, 4))
    ]
    _write(folder / "evaluations.jsonl", evaluations)
    responses = ["two and two is four", "two and two is five", EVIL, "a" * 100_000 + "\u202e\x07"]
    of_group = {"step": 1, "id": "p", "problem": "2+2", "answer": "4", "tokens": 5, "logprob": -1.0}
    mixed = {"mixed": [[4, 7]], "mixtures": [[0.97, " and", 0.8, " or", 0.2]]}
    samples = [
        {**of_group, **mixed, "sample": n, "response": text, "reward": float(n == 1), "stopped": n != 4}
        for n, text in enumerate(responses, 1)
    ]
    _write(folder / "samples.jsonl", samples)
    (folder / "config.json").write_text(json.dumps({"mixing": {"rate": rate}}))
    return read(folder)


@pytest.mark.parametrize("width", [1280, 390])
def test_one_run_in_a_browser(tmp_path, width):
    found = _browse(render(_workdir(tmp_path / "run")), tmp_path, _part("run.js"), width)
    assert found["errors"] == [] and found["wide"] == [] and found["title"] == "run · N-GRPO"
    assert found["charts"] == 4 and found["cards"] == found["back"] == 4 and found["whole"]
    assert found["parts"][1] == 1 and found["second"] == "two and two is five"
    assert "␣and" in found["popover"] and "80.0 %" in found["popover"] and "0.9700" in found["popover"]
    assert found["wrong"] == "3 of 4 responses" and found["both"] == "1 of 4 responses"
    assert re.fullmatch(r"step \d", found["at"]) and found["never"] == 1


def test_runs_compared_in_a_browser(tmp_path):
    runs = [_workdir(tmp_path / f"run{n}", rate) for n, rate in enumerate((0, 0.1))]
    steps = 'found.charts = document.querySelectorAll(".uplot canvas").length;'
    found = _browse(compare.render(runs), tmp_path, steps)
    assert found["errors"] == [] and found["wide"] == [] and found["charts"] > 3
