"""The report: what it shows, what it says is missing, what it refuses, and that a run's text stays text."""

import dataclasses
import html.parser
import http.client
import json
import re
import threading

import numpy as np
import pytest

from ngrpo_jax import flags
from ngrpo_jax.report import __main__ as report
from ngrpo_jax.report import charts, compare, held_out, mixing, numbers, page, panels, samples, serve
from ngrpo_jax.report.curves import Points
from ngrpo_jax.report.page import render
from ngrpo_jax.report.samples import Encoder
from ngrpo_jax.report.workdir import Run, read

VOID = {"meta", "br", "input"}


class _Checker(html.parser.HTMLParser):
    """Every tag closed in order; collects the visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.scripts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data.replace("\u00a0", " "))


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
    return json.loads(checker.scripts[0]), " ".join(checker.text)


def test_a_whole_run(tmp_path, capsys):
    summary = {
        "mean_at_n_before": 0.25,
        "mean_at_n_after": 0.75,
        "pass_at_k_before": 0.5,
        "pass_at_k_after": 0.4,
    }
    summary |= {
        "seconds": 185.0,
        "steps": 3,
        "checkpoint": "/old/place/checkpoints/3",
        "export": "/old/place/export",
    }
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
    data, text = _page(tmp_path, capsys)
    for words in ("Held-out Mean@8", "75.0 %", "+50.0 points", "Held-out Pass@4", "\u221210.0 points"):
        assert words in text
    for words in ("3 min 05 s", "checkpoints/3", "export", "neighbor mixing, ρ = 0.1, k = 3", "odd/thing"):
        assert words in text
    assert "/old/place" not in text
    (group,) = data["groups"]
    assert (group["step"], group["problem"], group["answer"]) == (1, "2+2?", "4")
    assert group["responses"][0]["parts"] == ["<think>", ["two"], " & two</think>\\boxed{4}"]
    assert "Not in this workdir" not in text
    assert len(data["charts"]) == 5  # reward, mixed, gap, phases, and the metric that no panel knows
    assert data["charts"][0]["lines"][0] == {
        "label": "training rollouts",
        "color": 0,
        "x": 0,
        "y": [0.1, 0.2, 0.3],
    }
    assert data["axes"] == [[1, 2, 3]]


def test_the_page_needs_nothing_else(tmp_path, capsys):
    _write(tmp_path)
    _page(tmp_path, capsys)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert links and all((one or other).startswith("#") for one, other in links)
    assert "default-src 'none'" in page  # a browser then loads nothing, whatever the page holds
    used = set(re.findall(r'href="#([\w.-]+)', page))
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
    _page(workdir, capsys)
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 3 and page.count("</script") == 3  # data, library, our own
    assert "<h1>&lt;b&gt;</h1>" in page


def test_text_that_hides_or_reorders_text_is_shown(tmp_path, capsys):
    """Control characters, marks of direction and halves of characters in what the page itself shows."""
    odd = "a\u202eb\x07c\ud800" + "x" * 100_000
    sample = {"step": 1, "id": "1", "problem": odd, "answer": "4", "response": odd, "reward": 0.0}
    _write(
        tmp_path, samples_jsonl=json.dumps(sample) + "\n", config_json=json.dumps({"model": {"path": odd}})
    )
    data, text = _page(tmp_path, capsys)
    assert "a⟨U+202E⟩b⟨U+0007⟩c" in text
    assert data["groups"][0]["responses"][0]["parts"] == [odd.replace("\ud800", "?")]


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
    ("spans", "parts"),
    [
        ([], ["a<b cd"]),
        ([[1, 3]], ["a", ["<b"], " cd"]),
        ([[0, 1], [4, 6]], [["a"], "<b ", ["cd"]]),
        ([[0, 2], [1, 3]], [["a<"], ["b"], " cd"]),
        ([[-5, 1], [5, 99], [50, 60]], [["a"], "<b c", ["d"]]),
    ],
)
def test_a_response_in_parts_is_whole(spans, parts):
    row = {"response": "a<b cd", "mixed": spans}
    assert Encoder().group([row])["responses"][0]["parts"] == parts


def test_mixtures_keep_their_candidates_and_texts_are_kept_once():
    encoder = Encoder()
    mixtures = [[0.99, "a", 0.9, "b", 0.1], [0.8, "b", 0.7, "a", 0.3]]
    rows = [{"response": "ab", "mixed": [[0, 1], [1, 2]], "mixtures": mixtures}]
    parts = encoder.group(rows)["responses"][0]["parts"]
    assert parts == [["a", 0.99, [0, 0.9, 1, 0.1]], ["b", 0.8, [1, 0.7, 0, 0.3]]]
    assert list(encoder.texts) == ["a", "b"]


def test_groups_that_fit_are_spread_over_the_run(monkeypatch):
    groups = [(n, [(10 * n, 10 * n + 10)]) for n in range(100)]
    assert samples.spread(groups) == groups
    monkeypatch.setattr(samples, "MOST_BYTES", 50)
    assert [n for n, _ in samples.spread(groups)] == [0, 25, 50, 74, 99]
    assert samples.spread([("too long", [(0, 60)])]) == [("too long", [(0, 60)])]


def test_mixtures_are_counted_over_the_whole_file(tmp_path):
    row = {"step": 1, "response": "x", "mixtures": [[0.9995, "a", 0.9, "b", 0.1], [0.94, "a", 0.7, "b", 0.3]]}
    path = tmp_path / "samples.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    found = samples.read(path).mixtures
    assert (found.count, found.least, found.anchors["a"][0]) == (6, 0.94, 6)
    assert found.total / 6 == pytest.approx(0.96975) and found.partners["a"]["b"] == pytest.approx(1.2)
    counted = dict(zip(samples.EDGES, found.cosines, strict=False))
    assert counted[0.999] == 3 and counted[0.9] == 3


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


def test_numbers_are_for_people():
    shown = [numbers.number(value) for value in (25840.3, 0.30000000000000004, 2.4e-5, -3, 0.0, float("nan"))]
    assert shown == ["25\u202f840", "0.3", "2.40 × 10⁻⁵", "\u22123", "0", "–"]
    assert [numbers.points(change) for change in (-0.0001, -0.021, 0.3)] == ["0.0", "\u22122.1", "+30.0"]
    assert numbers.quantity(0.1234, "%") == "12.3 %" and numbers.quantity(3.2e9, "bytes") == "2.98 GiB"


def test_labels_of_a_scatter_do_not_overlap():
    cloud = charts.Cloud("points", np.random.default_rng(0).normal(size=(50, 2)), 0, 2.0)
    crowd = [(f"token {n}", np.array([0.01 * n, 0.0])) for n in range(30)]
    drawn = charts.scatter_chart([cloud], crowd, ("first", "second"), "points")
    placed = [
        (float(x), float(y), len(text))
        for x, y, text in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([^<]*)', drawn)
    ]
    assert 1 < len(placed) < 30 and drawn.count("<title>") == 30 - len(placed)
    for n, (x, y, letters) in enumerate(placed):
        for other_x, other_y, other in placed[:n]:
            assert abs(y - other_y) >= 14 or x + 7.2 * letters <= other_x or other_x + 7.2 * other <= x


def _run(name, seed, rate, correct, *, steps=(0, 4)):
    """A run with two evaluations of three problems, eight responses each."""
    rows = [{"step": step, "reward/mean": 0.5} for step in range(1, steps[-1] + 1)]
    evaluations = [
        {
            "step": step,
            "mean_at_n": sum(counts) / 24,
            "samples": 8,
            "correct": dict(zip("abc", counts, strict=True)),
        }
        for step, counts in zip(steps, correct, strict=True)
    ]
    config = {"seed": seed, "mixing": {"rate": rate}, "mesh": {"data": seed + 1}}
    return Run(name, rows, evaluations=evaluations, config=config)


def test_the_verdict_says_what_is_known():
    risen = _run("risen", 0, 0.1, [(0, 1, 2), (6, 7, 8)])
    assert held_out.verdict(risen).startswith(
        "Held-out accuracy rose from 12.5 % to 87.5 % after 4 steps (+75.0 points"
    )
    same = _run("same", 0, 0.1, [(1, 4, 2), (2, 3, 2)])
    assert held_out.verdict(same).startswith("No change beyond chance")
    assert held_out.verdict(Run("none", risen.rows)) == ""


def test_the_verdict_says_when_most_of_the_gain_was_there():
    run = _run("run", 0, 0.1, [(0, 1, 2), (6, 7, 7), (6, 7, 8)], steps=(0, 2, 4))
    assert ", most of it by step 2 (83.3 %)." in held_out.verdict(run)


def test_a_change_is_coloured_beyond_chance_alone():
    config = {"eval": {"samples": 8, "pass_k": [4]}}
    runs = (
        _run(name, 0, 0.1, counts)
        for name, counts in (("risen", [(0, 1, 2), (6, 7, 8)]), ("same", [(1, 4, 2), (2, 3, 2)]))
    )
    for run, tone, words in zip(runs, ("good", ""), ("points", "points (within chance)"), strict=True):
        card = next(page._cards(dataclasses.replace(run, config=config)))
        assert card.name == "Held-out Mean@8" and card.tone == tone and card.detail.endswith(words)
    assert held_out.change_interval(_run("run", 0, 0.1, [(0, 0, 0), (8, 8, 8)]), 4) == (1.0, 1.0)


def test_the_paper_is_compared_with_all_steps_where_they_are_known():
    kept = samples.Mixtures()
    kept.add([[0.9, "a", 0.7, "b", 0.3]])
    cosines = {
        f"rollout/mix_cosine_{name}": x for name, x in (("mean", 0.99), ("min", 0.5), ("below_095", 0.02))
    }
    of_run = mixing.summary(kept, Run("run", [{"step": 1, **cosines}]))["appendix"][1]
    assert of_run[0] == ("this run, all steps", ("0.9900", "0.5000", "2.0 %"))
    assert [name for name, _ in of_run[1:]] == ["kept responses", "paper, Appendix E"]
    assert len(mixing.summary(kept, Run("run", [{"step": 1}]))["appendix"][1]) == 2


def test_a_best_checkpoint_below_the_start_is_called_that():
    fallen = _run("fallen", 0, 0.1, [(4, 8, 8), (3, 8, 8)])
    sentence = " The best checkpoint is that of step 4 (79.2 % held out)"
    for value, end in ((19 / 24, "; below the starting model's 83.3 %."), (20 / 24, ".")):
        best = dataclasses.replace(fallen, summary={"best_step": 4, "best_value": value})
        assert held_out.verdict(best).endswith(sentence.replace("79.2", f"{100 * value:.1f}") + end)


def test_held_out_problems_never_solved_learnt_and_lost():
    found = held_out.problems(_run("run", 0, 0.1, [(0, 0, 3), (0, 5, 0)]))
    assert [(row["id"], row["kind"], row["best"]) for row in found["rows"]] == [
        ("a", "never", 0),
        ("c", "lost", 3),  # the fewest right at last come first
        ("b", "learnt", 5),
    ]
    assert found["counts"] == {"never": 1, "learnt": 1, "lost": 1}


def test_seeds_of_one_setting_are_joined():
    runs = [
        _run(f"{rate}-{seed}", seed, rate, [(0, 0, 0), (seed, 0, 8)])
        for rate in (0.0, 0.1)
        for seed in range(3)
    ]
    named = compare.differing(runs)
    assert named == ["seed", "mixing.rate", "mesh.data"]
    joined = compare.settings_of(runs, ["mixing.rate"])
    assert [(one.name, len(one.runs)) for one in joined] == [("GRPO (rate 0)", 3), ("N-GRPO (rate 0.1)", 3)]
    curve = compare.joined(
        [Points((0, 4), [0.0, v]) for v in (0.1, 0.2, 0.6)] + [Points((0, 2, 4), [0.0, 9.0, 0.3])]
    )
    assert curve == Points((0, 4), [0.0, pytest.approx(0.3)], [0.0, 0.1], [0.0, 0.6])
    page = compare.render(runs)
    assert "GRPO (rate 0) against N-GRPO (rate 0.1)" in page and "No difference beyond chance: N-GRPO" in page


def test_what_a_comparison_is_of_is_said(tmp_path, capsys):
    """Other problems a seed, one paused step, an interval beyond 100 %, and the runs' own pages."""

    def run(name, rate, seed, keys, counts, seconds):
        found = _run(name, seed, rate, [(0, 0, 0), counts])
        rows = [{"step": n + 1, "time/step": s, "time/rollout": s} for n, s in enumerate(seconds)]
        last = found.evaluations[-1] | {"correct": dict(zip(keys, counts, strict=True))}
        return dataclasses.replace(found, rows=rows, evaluations=[found.evaluations[0], last])

    runs = [
        run("a0", 0.0, 0, "abc", (8, 8, 8), [1.0, 2.0, 2.0]),
        run("a1", 0, 1, "ade", (0, 8, 8), [1.0, 2.0, 2.0]),
        run("b0", 0.1, 0, "abc", (8, 8, 0), [1.0, 2.0, 2.0]),
        run("b1", 0.1, 1, "ade", (8, 8, 8), [1.0, 500.0, 2.0]),
    ]
    a, b = compare.settings_of(runs, ["mixing.rate"])
    assert (a.name, b.name) == ("GRPO (rate 0)", "N-GRPO (rate 0.1)")
    final = dict(zip(compare._COLUMNS, compare._final(b), strict=True))
    assert final["time a step (median)"] == "2.0 s" and final["95 % interval"].endswith("(cut at 0 and 100)")
    assert "each problem counted once (the means over seeds differ by 0.0); 95 %" in compare._verdict([a, b])
    page = compare.render(runs, ["a0/report.html", "", "", ""])
    for words in (
        "5 distinct problems over all seeds",
        "only GRPO (rate 0)<",
        '<a href="a0/report.html">a0</a>',
    ):
        assert words in page, words
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    (top,) = {chart["top"] for chart in data["charts"] if "top" in chart}
    assert top == 8.0, "the paused step does not flatten the chart"


def test_pairs_count_the_problems_that_one_setting_alone_solves():
    a = compare.Setting("A", [_run("a", 0, 0.0, [(0, 0, 0), (0, 8, 0)])])
    b = compare.Setting("B", [_run("b", 0, 0.1, [(0, 0, 0), (4, 8, 0)])])
    (row,) = compare._pairs([a, b])
    assert row[0] == "B against A" and row[1].startswith("+16.7")
    assert row[2:] == ["1", "0", "1", "1", "1.000"]  # both, A alone, B alone, neither


def test_a_difference_counts_where_neither_problems_nor_seeds_explain_it():
    def of(rate, counts):
        return [_run(f"{rate}-{n}", n, rate, [(0, 0, 0), row]) for n, row in enumerate(counts)]

    better = compare._verdict(
        compare.settings_of(
            of(0.1, [(7, 8, 8), (8, 7, 8), (8, 8, 7)]) + of(0, [(1, 2, 1), (1, 1, 2), (2, 1, 1)]),
            ["mixing.rate"],
        )
    )
    assert better.startswith(
        "A difference beyond chance: N-GRPO (rate 0.1) against GRPO (rate 0) is +79.2 points"
    )
    assert "over 3 seeds" in better and "(seed by seed +79.2, +79.2, +79.2)" in better
    # Better on every problem, and by one seed alone.
    lucky = compare.settings_of(
        of(0.1, [(8, 8, 8), (1, 1, 1), (1, 1, 1)]) + of(0, [(1, 1, 1)] * 3), ["mixing.rate"]
    )
    assert compare._verdict(lucky).startswith("No difference beyond chance")
    assert compare._uneven(lucky) == ""
    others = [*"abcd"]  # so many settings make no name
    assert [one.name for one in compare.settings_of([*lucky[0].runs, *lucky[1].runs], others)] == ["0-0"]
    short = _run("short", 0, 0.1, [(0, 0, 0)], steps=(0,))
    assert "different steps (0, 4)" in compare._uneven([*lucky, compare.Setting("short", [short])])


def test_compare_takes_folders_and_globs_and_refuses_one(tmp_path, capsys):
    for name in ("a", "b"):
        _write(tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "a.log").touch()
    out = tmp_path / "page.html"
    flags.run_command(report.main, ["report", "compare", str(tmp_path / "*"), f"--out={out}"])
    assert "2 runs compared" in out.read_text(encoding="utf-8")
    expanded = [str(tmp_path / name) for name in ("a", "a.log", "b")]  # by the shell
    flags.run_command(report.main, ["report", "compare", *expanded, f"--out={out}"])
    with pytest.raises(SystemExit) as refusal:
        flags.run_command(report.main, ["report", "compare", str(tmp_path / "a")])
    assert refusal.value.code == 2 and "two workdirs" in capsys.readouterr().err


def test_a_served_page_follows_the_run_and_answers_to_this_machine_alone(tmp_path):
    _write(tmp_path, steps=2)
    with serve.make_server(tmp_path, lambda: render(read(tmp_path)), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"

        def get(path, host="localhost"):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        status, page = get("/")
        assert status == 200 and '"axes":[[1,2]]' in page
        before = get("/stamp")
        _write(tmp_path, steps=3)
        assert get("/stamp") != before and '"axes":[[1,2,3]]' in get("/")[1]
        assert get("/", host="evil.example")[0] == 403 and get("/metrics.jsonl")[0] == 404
        (tmp_path / "metrics.jsonl").write_text("")
        assert get("/")[0] == 503
        server.shutdown()
