"""The report: what it shows, what it says is missing, what it refuses, and that a run's text stays text."""

import html.parser
import json
import re

import numpy as np
import pytest

from ngrpo_jax import flags
from ngrpo_jax.report import __main__ as report
from ngrpo_jax.report import charts, panels
from ngrpo_jax.report.samples import highlight, spread

VOID = {"meta", "br", "path", "use", "rect"}


class _Checker(html.parser.HTMLParser):
    """Every tag closed in order; collects the visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _write(workdir, steps=3, **files):
    workdir.mkdir(exist_ok=True)
    rows = [
        {
            "step": step,
            "reward/mean": 0.1 * step,
            "rollout/mixed_fraction": 0.1,
            "gap/mean": 1e-6,
            "gap/max": 3e-5,
            "time/rollout": 2.0,
            "time/update": 1.0,
            "time/step": 3.0,
            "learner/kl": None,
            "odd/thing": 7.0,
        }
        for step in range(1, steps + 1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in files.items():
        (workdir / name.replace("_", ".", 1)).write_text(text)


def _page(workdir, capsys):
    flags.run_command(report.main, ["report", f"--workdir={workdir}"])
    assert str(workdir / "report.html") in capsys.readouterr().out
    page = (workdir / "report.html").read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(page)
    assert not checker.open
    return page, " ".join(checker.text)


def test_a_whole_run(tmp_path, capsys):
    summary = {
        "mean_at_n_before": 0.25,
        "mean_at_n_after": 0.75,
        "pass_at_k_before": 0.5,
        "pass_at_k_after": 0.4,
    }
    summary |= {"seconds": 185.0, "steps": 3, "checkpoint": "ck/3", "export": "out/export"}
    config = {
        "seed": 0,
        "eval": {"samples": 8, "pass_k": 4},
        "mixing": {"strategy": "neighbor", "rate": 0.1, "k": 3},
    }
    response = "<think>two & two</think>\\boxed{4}"
    sample = {
        "step": 1,
        "problem": "2+2?",
        "answer": "4",
        "response": response,
        "reward": 1.0,
        "mixed": [[7, 10]],
    }
    _write(
        tmp_path,
        summary_json=json.dumps(summary),
        config_json=json.dumps(config),
        samples_jsonl=json.dumps(sample) + "\n",
    )
    page, text = _page(tmp_path, capsys)
    for words in ("Held-out Mean@8", "75.0 %", "+50.0 points", "Held-out Pass@4", "\u221210.0 points"):
        assert words in text
    for words in ("3 min 05 s", "ck/3", "out/export", "neighbor mixing, ρ = 0.1, k = 3", "odd/thing"):
        assert words in text
    assert "&lt;think&gt;<mark>two</mark> &amp; two&lt;/think&gt;\\boxed{4}" in page
    assert "Not in this workdir" not in text
    assert page.count("<svg") == 5  # reward, mixed, gap, phases, and the metric that no panel knows


def test_the_page_needs_nothing_else(tmp_path, capsys):
    _write(tmp_path)
    page, _ = _page(tmp_path, capsys)
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert links and all((one or other).startswith("#") for one, other in links)
    assert "<script" not in page
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', page))
    assert used <= set(re.findall(r' id="([\w.-]+)"', page))


def test_what_is_missing_is_said(tmp_path, capsys):
    _write(tmp_path, steps=1)
    _, text = _page(tmp_path, capsys)
    for name in ("summary.json", "config.json", "samples.jsonl"):
        assert f"There is no {name}" in text
    assert "Held-out Mean" not in text


def test_the_same_run_gives_the_same_page(tmp_path, capsys):
    _write(tmp_path, steps=40)
    assert _page(tmp_path, capsys)[0] == _page(tmp_path, capsys)[0]


def test_text_of_the_run_is_never_markup(tmp_path, capsys):
    evil = "<script>alert(1)</script>"
    sample = {
        "step": evil,
        "problem": evil,
        "answer": evil,
        "response": evil,
        "reward": None,
        "mixed": [[0, 4]],
    }
    config = {evil: {evil: evil}, "model": {"path": evil}}
    workdir = tmp_path / "<b>"
    _write(
        workdir,
        samples_jsonl=json.dumps(sample) + "\n",
        config_json=json.dumps(config),
        summary_json=json.dumps({"checkpoint": evil}),
    )
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, f"x/{evil}": 1.0}) + "\n")
    page, _ = _page(workdir, capsys)
    assert "<script" not in page
    assert "<h1>&lt;b&gt;</h1>" in page


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "is no directory"),
        ({}, "has no metrics.jsonl"),
        ({"metrics.jsonl": ""}, "is empty"),
        ({"metrics.jsonl": "nonsense\n"}, "metrics.jsonl line 1 is not JSON"),
        ({"metrics.jsonl": '{"step": 1}\n', "summary.json": "{"}, "summary.json is not JSON"),
        ({"metrics.jsonl": '{"step": 1}\n', "config.json": "[]"}, "config.json holds no JSON object"),
        (
            {"metrics.jsonl": '{"step": 1}\n', "samples.jsonl": '{"step": 1}\n'},
            "samples.jsonl line 1 has no `response`",
        ),
    ],
)
def test_bad_workdirs_are_one_sentence_and_status_2(tmp_path, capsys, files, words):
    workdir = tmp_path / "run"
    if files is not None:
        workdir.mkdir()
        for name, text in files.items():
            (workdir / name).write_text(text)
    with pytest.raises(SystemExit) as refusal:
        flags.run_command(report.main, ["report", f"--workdir={workdir}"])
    assert refusal.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (workdir / "report.html").exists()


@pytest.mark.parametrize(
    ("spans", "marked"),
    [
        ([], "a&lt;b cd"),
        ([[1, 3]], "a<mark>&lt;b</mark> cd"),
        ([[4, 6], [0, 1]], "<mark>a</mark>&lt;b <mark>cd</mark>"),
        ([[0, 2], [1, 3]], "<mark>a&lt;</mark><mark>b</mark> cd"),
        ([[-5, 1], [5, 99], [50, 60]], "<mark>a</mark>&lt;b c<mark>d</mark>"),
    ],
)
def test_spans_are_marked_inside_escaped_text(spans, marked):
    assert highlight("a<b cd", spans) == marked


def test_shown_responses_are_spread_over_the_run():
    assert spread(range(5), 24) == [0, 1, 2, 3, 4]
    shown = spread(range(1000), 24)
    assert len(shown) == 24 and (shown[0], shown[-1]) == (0, 999)


def test_every_metric_is_drawn_once():
    known = [key for section in panels.SECTIONS for panel in section.panels for key in panel.series]
    assert len(known) == len(set(known))
    drawn = [
        key
        for section in panels.present([*known, "new/key"])
        for panel in section.panels
        for key in panel.series
    ]
    assert sorted(drawn) == sorted([*known, "new/key"])
    assert panels.present(["time/step"]) == []  # the chart of its phases shows as much


def test_running_mean_is_the_mean_of_what_lies_within():
    values = np.arange(10.0) ** 2
    found = charts.running_mean(values, 3)
    assert found[4] == pytest.approx(values[3:6].mean())
    assert found[0] == pytest.approx(values[:2].mean())


def test_axis_labels_are_readable():
    assert [charts.tick(v, "%") for v in (0.5, -0.025)] == ["50 %", "\u22122.5 %"]
    assert [charts.tick(v, "") for v in (0.30000000000000004, 2e-6, 12000)] == ["0.3", "2e\u221206", "12.0 k"]
