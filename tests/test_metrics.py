"""The files of a run byte for byte, loggers, and console output."""

import io
import json
import os
import re
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from ngrpo_jax.errors import UserError
from ngrpo_jax.runtime import console, loggers
from ngrpo_jax.runtime.metrics import RunLog, read_rows, scalar


def _run(workdir, steps, resume_step=None):
    with RunLog(workdir, resume_step=resume_step, loggers=("tensorboard",)) as log:
        for step in steps:
            metrics = {"reward/mean": jnp.float32(0.1) * step, "n": np.int64(step), "kl": float("nan")}
            log.write(step, metrics, [{"step": step, "response": "a\u2028ü"}] * 2)
    return (workdir / "metrics.jsonl").read_bytes(), (workdir / "samples.jsonl").read_bytes()


def test_one_object_a_step_and_null_where_not_finite(tmp_path):
    lines = _run(tmp_path, [0, 1])[0].decode().split("\n")
    assert json.loads(lines[1]) == {"step": 1, "reward/mean": float(np.float32(0.1)), "n": 1, "kl": None}
    assert lines[2:] == [""]


def test_the_files_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tmp_path):
    whole = _run(tmp_path / "a", range(8))
    _run(tmp_path / "b", range(6))  # killed after step 5, its last checkpoint at step 3
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "b" / name).open("a") as file:
            file.write('{"step": 6, "re')
    assert _run(tmp_path / "b", range(4, 8), resume_step=3) == whole


def test_evaluations_and_restarts_have_files_of_their_own(tmp_path):
    with RunLog(tmp_path) as log:
        log.write_evaluation(0, {"mean_at_n": 0.5}, {"eval/mean_at_n": 0.5})
        for step in (1, 2):
            log.write(step, {"a": 1.0})
        log.write_evaluation(2, {"mean_at_n": 0.6}, {})
    assert not (tmp_path / "restarts.jsonl").exists()
    with RunLog(tmp_path, resume_step=1) as log:  # the row of step 2 is made again
        log.write(2, {"a": 1.0})
        log.write_evaluation(2, {"mean_at_n": 0.7}, {})
    with RunLog(tmp_path, resume_step=2) as log:  # and not a second time
        log.write_evaluation(2, {"mean_at_n": 0.8}, {})
    rows = read_rows(tmp_path / "evaluations.jsonl")
    assert rows == [{"step": 0, "mean_at_n": 0.5}, {"step": 2, "mean_at_n": 0.7}]
    assert [row["step"] for row in read_rows(tmp_path / "restarts.jsonl")] == [1, 2]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_new_run_drops_all_rows(tmp_path):
    _run(tmp_path, range(3))
    metrics, samples = _run(tmp_path, [0])
    assert [json.loads(line)["step"] for line in metrics.split(b"\n")[:-1]] == [0]
    assert [json.loads(line)["step"] for line in samples.split(b"\n")[:-1]] == [0, 0]


def test_steps_must_advance(tmp_path):
    with RunLog(tmp_path, resume_step=3) as log:
        with pytest.raises(ValueError, match="step 3 come after those of step 3"):
            log.write(3, {})
        log.write(4, {})
        with pytest.raises(ValueError, match="must advance"):
            log.write(4, {})


@pytest.mark.parametrize("value", [np.zeros(2), "text", None, [1.0, 2.0]])
def test_a_metric_is_one_number(value):
    with pytest.raises(ValueError, match="'gap/max'"):
        scalar("gap/max", value)


def test_only_the_primary_process_writes(tmp_path):
    with RunLog(tmp_path / "none", loggers=("tensorboard",), primary=False) as log:
        log.write(1, {"a": 1.0}, [{"step": 1}])
        with pytest.raises(ValueError, match="must advance"):
            log.write(1, {"a": 1.0})
    assert not os.listdir(tmp_path)


def test_event_files_hold_the_numbers_and_purge_what_is_made_again(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    _run(tmp_path, range(3))
    _run(tmp_path, [2], resume_step=1)
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord framing: length, its checksum, the record, its checksum
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    found = [(v.tag, e.step, v.simple_value) for e in events for v in e.summary.value]
    assert ("reward/mean", 2, pytest.approx(0.2)) in found
    assert not [tag for tag, _, _ in found if tag == "kl"]
    assert [e.step for e in events if e.session_log.status] == [0, 2]  # purge from there on


def test_a_logger_of_ones_own_gets_every_step_and_is_closed(tmp_path, monkeypatch):
    events = []

    class Recorder:
        def __init__(self, workdir, first_step):
            events.append((workdir, first_step))

        def write(self, step, metrics, samples=()):
            events.append((step, metrics))

        def close(self):
            events.append("closed")

    monkeypatch.setitem(loggers.LOGGERS, "recorder", Recorder)
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, resume_step=3, loggers=["recorder"]) as log:
        log.write(4, {"kl": np.float32("inf"), "n": 2})
        raise KeyboardInterrupt
    assert events == [(tmp_path, 4), (4, {"kl": None, "n": 2}), "closed"]


def test_a_broken_row_is_refused_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not JSON"):
        read_rows(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(UserError, match="line 2 is no object"):
        RunLog(tmp_path, resume_step=1)
    path.write_text('{"step": 1, "x": "\u2028"}\n{"step": 2')
    assert [row["step"] for row in read_rows(path)] == [1]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _progress(stream, ticks, **options):
    now = [0.0]
    with console.Progress(
        "rollout", ticks, "sequences", stream=stream, clock=lambda: now[0], **options
    ) as bar:
        for done in range(1, ticks + 1):
            now[0] += 0.5
            bar.update(bar._start + done)
    return stream.getvalue()


def test_progress_off_a_terminal_prints_now_and_then():
    lines = _progress(io.StringIO(), 50).split("\n")
    assert lines[0] == "rollout 16/50 sequences · 2 sequences/s · 8.0 s · 17 s left"
    assert lines[1] == "rollout 32/50 sequences · 2 sequences/s · 16 s · 9.0 s left"
    assert lines[2:] == [
        "rollout 48/50 sequences · 2 sequences/s · 24 s · 1.0 s left",
        "rollout 50/50 sequences · 2 sequences/s · 25 s",
        "",
    ]
    assert _progress(io.StringIO(), 5) == ""  # too short to speak of
    assert _progress(io.StringIO(), 50, enabled=False) == ""


def test_short_works_one_after_the_other_are_no_long_silence(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console, "_said_at", 100.0)
    for number in range(5):
        with console.Progress(f"work {number}", 2, "parts", clock=lambda: now[0]) as bar:
            now[0] += 3
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" 1/2")[0] for line in lines] == ["work 2"]


def test_the_first_line_of_a_log_comes_at_once():
    words = "from ngrpo_jax.runtime.console import Progress; Progress('work', 9, 'parts').update(0)"
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert ended.stderr.startswith("work 0/9 parts")


def test_progress_on_a_terminal_rewrites_its_line():
    text = _progress(_Terminal(), 4)
    assert text.count("\r") == 4 and text.endswith("rollout 4/4 sequences · 2 sequences/s · 2.0 s\x1b[K\n")
    assert _progress(_Terminal(), 4, keep=False).endswith("\r\x1b[K")


def test_what_was_done_before_does_not_count_for_the_rate():
    now = [0.0]
    bar = console.Progress("train", 100, "steps", start=90, stream=io.StringIO(), clock=lambda: now[0])
    now[0] = 10.0
    bar.update(95)
    assert bar.line("loss 1") == "train 95/100 steps · 30 steps/min · 10 s · 10 s left · loss 1"


def test_table_stands_in_columns():
    text = console.table([("Mean@8", 0.25, None), ("Pass@8", 0.5, 12)], ("figure", "before", "after"))
    assert text.split("\n") == [
        "figure  before  after",
        "──────  ──────  ─────",
        "Mean@8    0.25      –",
        "Pass@8     0.5     12",
    ]
    assert console.table([], ("a", "b")).split("\n") == ["a  b", "─  ─"]
    with pytest.raises(ValueError, match="shorter"):
        console.table([(1,)], ("a", "b"))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (console.format_seconds(0.1234), "0.12 s"),
        (console.format_seconds(9.96), "10 s"),
        (console.format_seconds(185), "3 min 05 s"),
        (console.format_seconds(3599.8), "1 h 00 min"),
        (console.format_seconds(90000), "1 d 01 h"),
        (console.format_seconds(float("inf")), "–"),
        (console.format_count(9999), "9999"),
        (console.format_count(12345), "12.3 k"),
        (console.format_count(999_999), "1.00 M"),
        (console.format_count(2.5), "2.5"),
        (console.format_rate(5200.4, "tokens"), "5200 tokens/s"),
        (console.format_rate(0.5, "steps"), "30 steps/min"),
        (console.format_rate(0.001, "steps"), "3.6 steps/h"),
        (console.format_bytes(512), "512 B"),
        (console.format_bytes(16e9), "14.9 GiB"),
    ],
)
def test_numbers_are_readable(call, text):
    assert call == text


class _Screen(io.StringIO):
    """80 columns: keeps the rows of the screen, as a terminal that wraps would show them."""

    def __init__(self):
        super().__init__()
        self.rows, self.column = [""], 0

    def isatty(self):
        return True

    def write(self, text):
        for part in re.split("(\r|\n|\x1b\\[K)", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.rows.append("")
                self.column = 0
            elif part == "\x1b[K":
                self.rows[-1] = self.rows[-1][: self.column]
            else:
                for c in part:
                    if self.column == 80:
                        self.rows.append("")
                        self.column = 0
                    self.rows[-1] = self.rows[-1][: self.column] + c + self.rows[-1][self.column + 1 :]
                    self.column += 1


def test_a_redrawn_line_never_takes_two_rows_of_a_terminal():
    screen, now = _Screen(), [0.0]
    label = "warm start on 3439 worked solutions"
    with console.Progress(label, 300, "steps", stream=screen, clock=lambda: now[0]) as bar:
        for done in range(1, 300):
            now[0] += 7.3
            bar.update(done, f"loss {1 / done:.3f} nats/token, {done} of 300 steps busy")
            assert len(screen.rows) == 1 and screen.rows[0].startswith(label)
    assert len(screen.rows) == 2 and screen.rows[1] == ""


def test_work_that_reports_nothing_is_not_silent():
    stream = io.StringIO()
    with console.Progress("compiling", stream=stream, every=0.0):
        deadline = time.monotonic() + 30
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stream.getvalue().startswith("compiling · ")


def test_symbols_that_the_encoding_lacks_are_spelled_out(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.spell_out_symbols()
    print("32 prompts × 8 · 5 − 3 … ⟦a⟧ 语", flush=True)
    assert raw.getvalue() == b"32 prompts x 8 - 5 - 3 ... [a] \\u8bed\n"


def test_a_table_that_is_too_wide_goes_on_below(monkeypatch):
    assert console.column_blocks([10, 30, 30, 30, 8], 79) == [[0, 1, 2], [0, 3, 4]]
    assert console.column_blocks([60, 60], 79) == [[0, 1]]  # a column is never cut in two
    screen = _Screen()
    monkeypatch.setattr("sys.stdout", screen)
    text = console.table([("a", "x" * 40, "y" * 40, 7)], ("name", "first", "second", "count"))
    assert max(map(len, text.splitlines())) <= 79 and "count" in text and text.count("name") == 2


def test_weights_and_biases_gets_metrics_and_groups_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """By a stand-in for the library, which records what it is told."""
    calls = []

    class Run:
        def define_metric(self, name, **_):
            pass

        def log(self, row):
            calls.append(row)

        def finish(self):
            calls.append("finished")

    def init(**given):
        calls.append({name: given[name] for name in ("project", "entity", "id", "resume")})
        return Run()

    def table(columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Table=table))
    (tmp_path / "config.json").write_text(json.dumps({"log": {"wandb": "team/project"}}))
    sample = {"step": 1, "response": "<b>", "reward": 1.0}
    with RunLog(tmp_path, loggers=("wandb",)) as log:
        log.write_evaluation(0, {"mean_at_n": 0.5}, {"eval/mean_at_n": 0.5})
        log.write(1, {"reward/mean": 0.5, "kl": float("nan")}, [sample])
        log.write(2, {"reward/mean": 0.6}, [sample | {"step": 2}])
    first, *rows = calls
    assert (first["project"], first["entity"], first["resume"]) == ("project", "team", "allow")
    assert rows[0] == {"step": 0, "eval/mean_at_n": 0.5}
    assert rows[1]["groups"][0]["response"] == "<b>" and "kl" not in rows[1]
    assert rows[2:] == [{"step": 2, "reward/mean": 0.6}, "finished"]
    calls.clear()
    with RunLog(tmp_path, resume_step=1, loggers=("wandb",)):
        pass
    assert calls[0]["id"] == first["id"]
    with RunLog(tmp_path, loggers=("wandb",)):
        pass
    assert calls[2]["id"] != first["id"]  # a new run in the same folder


def test_a_logger_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    loggers.require_installed(("tensorboard",))
    with pytest.raises(UserError, match="pip install wandb"):
        loggers.require_installed(("tensorboard", "wandb"))
