"""The commands from end to end on a very small model: the ring turns, resumes, refuses."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from ngrpo_jax import evaluate, export, train
from ngrpo_jax.flags import run_command
from ngrpo_jax.model import hf
from ngrpo_jax.report import __main__ as report
from ngrpo_jax.report import panels
from ngrpo_jax.run import loop, step
from ngrpo_jax.runtime import ending
from ngrpo_jax.runtime.lock import held
from ngrpo_jax.runtime.metrics import VARYING_GROUPS, read_rows

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"
SMALL = {
    "warm_start.num_layers": 2,
    "warm_start.hidden_size": 32,
    "warm_start.intermediate_size": 48,
    "warm_start.steps": 10,
    "warm_start.batch": 8,
    "data.train_size": 40,
    "rollout.prompts": 4,
    "rollout.group": 4,
    "rollout.max_new_tokens": 12,
    "rollout.slots": None,
    "train.mini_batch_prompts": 2,
    "train.row_tokens": 64,
    "train.rows_per_device": 1,
    "train.steps": 2,
    "checkpoint.every": 6,
    "eval.every": 6,
    "eval.problems": 4,
    "eval.samples": 2,
    "eval.pass_k": 2,
    "eval.max_new_tokens": 12,
    "mesh.data": 8,
    "mixing.rate": 0.5,
    "reward.kind": "own_reward:odd_length",
    "objective.importance_cap": 2.0,
    "objective.overlong": "penalize",
    "objective.skip_zero_variance": True,
}


METRICS = {f"time/{phase}" for phase in ("step", "table", "rollout", "reward", "logprobs", "update")}
METRICS |= {f"speed/{name}" for name in ("step_tokens", "rollout_tokens", "reward_tokens")} | {"memory/peak"}
METRICS |= {"speed/logprob_tokens", "speed/update_tokens", "rows/fill", "gap/mean", "gap/max", "gap/kl"}
METRICS |= {
    f"learner/{name}" for name in ("clip_low", "clip_high", "dual_clip", "ratio", "ratio_min", "ratio_max")
}
METRICS |= {
    f"learner/{name}" for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm", "update_norm")
}


def _argv(workdir, *more, **changes):
    settings = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["command", f"--config={TINY}", f"--workdir={workdir}", *overrides, *more]


def _run(command, workdir, *more, **changes):
    run_command(command.main, _argv(workdir, *more, **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished run of 12 steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    _run(train, workdir, train__steps=12)
    return workdir


def _timeless(path):
    return [{k: v for k, v in row.items() if not k.startswith(VARYING_GROUPS)} for row in read_rows(path)]


def _leaves(directory):
    return jax.tree_util.tree_leaves_with_path(hf.load(directory)[1])


@pytest.mark.parametrize("command", [train, evaluate, export])
def test_help_says_how_a_command_is_used(command, capsys):
    run_command(command.main, ["command", "--help"])
    name = command.__name__
    printed = capsys.readouterr().out
    assert f"python -m {name}" in printed and "--workdir=DIR" in printed
    # Of the settings those that the command reads.
    assert ("optimizer.learning_rate=" in printed) == (command is train)
    assert ("eval.temperature=" in printed) == (command in (train, evaluate))
    assert "model.path=" in printed and "2147483647" not in printed and "preflight/" not in printed


def test_a_run_stopped_and_resumed_ends_as_one_that_was_not(finished, tmp_path, monkeypatch, capsys):
    """Stopped twice: by `train.steps` at step 4, and by the keyboard in step 9, after the checkpoint of 6."""
    workdir = tmp_path / "run"
    _run(train, workdir, train__steps=4)
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 4
    whole_step = loop.train_step

    def stops_in_step_nine(run, state, grader):
        if state.step == 8:
            raise KeyboardInterrupt
        return whole_step(run, state, grader)

    monkeypatch.setattr(loop, "train_step", stops_in_step_nine)
    with pytest.raises(SystemExit) as stopped:
        _run(train, workdir, train__steps=12)
    assert stopped.value.code == 130 and len(read_rows(workdir / "metrics.jsonl")) == 8
    monkeypatch.setattr(loop, "train_step", whole_step)
    _run(train, workdir, train__steps=12)
    assert "resumed from step 6" in capsys.readouterr().out
    rows = _timeless(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows == _timeless(finished / "metrics.jsonl")
    assert any(row["learner/grad_norm"] > 0 for row in rows[6:]), (
        "nothing was learnt: equality proves nothing"
    )
    assert (workdir / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()
    for (path, ours), (_, theirs) in zip(
        _leaves(workdir / "export"), _leaves(finished / "export"), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


def test_training_changes_the_parameters_and_writes_its_summary(finished):
    moved = [
        not np.array_equal(a, b)
        for (_, a), (_, b) in zip(_leaves(finished / "export"), _leaves(finished / "warm_start"), strict=True)
    ]
    assert all(moved)
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("mean_at_n_before", "mean_at_n_after", "pass_at_k_before", "pass_at_k_after"):
        assert 0 <= summary[name] <= 1
    assert summary["steps"] == 12 and summary["seconds"] > 0
    assert pathlib.Path(summary["checkpoint"]).is_dir() and pathlib.Path(summary["export"]).is_dir()
    rows = read_rows(finished / "metrics.jsonl")
    assert all(row["gap/max"] < 1e-4 for row in rows)
    assert all(row.keys() >= METRICS for row in rows)
    assert 0.1 < np.mean([row["rollout/mixed_fraction"] for row in rows]) < 0.9
    assert [row["step"] for row in rows if "eval/mean_at_n" in row] == [6, 12]
    assert all(row["speed/verdicts"] > 0 and row["reward/no_verdict"] == 0 for row in rows)
    assert summary["zero_variance"] == np.mean([row["groups/zero_variance"] for row in rows])


def test_the_page_of_metrics_names_what_a_run_writes_and_nothing_else(finished):
    """All but what devices without a known peak leave out; tests/test_step.py has those."""
    page = (TINY.parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+/\w+)` \|[^|]+\| ([^|]+) \|[^|]+\|$", page, re.MULTILINE)
    when = dict(lines)
    assert len(when) == len(lines) == page.count("\n| `"), "a line is not whole, or a name is there twice"
    rows = [row.keys() - {"step"} for row in read_rows(finished / "metrics.jsonl")]
    assert set().union(*rows) <= when.keys(), "written by a run and not on the page"
    always = {name for name, condition in when.items() if condition == "always"}
    assert all(always <= row for row in rows), "said to be written always, and missing from a row"
    assert when.keys() - set().union(*rows) == {"speed/update_mfu"}, "on the page and not written by a run"


def test_the_report_has_a_place_for_all_that_a_run_writes_and_for_nothing_else(finished):
    written = {key for row in read_rows(finished / "metrics.jsonl") for key in row} - {"step"}
    placed = {key for section in panels.SECTIONS for panel in section.panels for key in panel.series}
    assert placed - written <= {"speed/update_mfu"}  # for devices alone whose peak is known
    (*_, last) = panels.present(sorted(written))
    assert last.title != panels.REST_TITLE, last.panels


def test_both_the_latest_and_the_best_by_the_chosen_metric_are_kept_and_told(tmp_path, capsys):
    workdir = tmp_path / "run"
    chosen = {"checkpoint__best_metric": "pass_at_k", "eval__every": 1, "checkpoint__every": 1}
    _run(train, workdir, train__steps=3, **chosen)
    printed = capsys.readouterr().out
    rows = read_rows(workdir / "metrics.jsonl")
    scores = [row["eval/pass_at_k"] for row in rows]
    best = max(range(3), key=lambda index: (scores[index], index)) + 1  # ties to the newest
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["best_step"], summary["best_value"]) == (best, max(scores))
    assert pathlib.Path(summary["best_checkpoint"]).is_dir() and pathlib.Path(summary["checkpoint"]).is_dir()
    assert f"latest     {workdir}/checkpoints/3 (step 3)" in printed
    assert f"best       {workdir}/checkpoints/{best} (step {best}, pass_at_k {max(scores):.4g}" in printed


def test_a_finished_run_says_so_and_changes_nothing(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    _run(train, finished, train__steps=12)
    assert "holds a finished run of 12 steps" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_evaluate_grades_and_stores_responses(finished, capsys):
    _run(evaluate, finished, "--step=latest")
    printed = capsys.readouterr().out
    assert "Mean@2" in printed and "Pass@2" in printed and "best@2 (bootstrap" in printed
    text = (finished / "generations_12_arithmetic.jsonl").read_text()
    header, *rows = [json.loads(line) for line in text.split("\n")[:-1]]
    assert header["depends"]["eval.samples"] == 2 and header["problems"] == 4
    assert len(rows) == 8 and {row["reward"] for row in rows} <= {0.0, 1.0}
    summary = json.loads((finished / "summary.json").read_text())
    assert np.mean([row["reward"] for row in rows]) == summary["mean_at_n_after"]


def test_evaluate_tries_a_prompt_with_mixed_tokens_marked(finished, capsys):
    _run(evaluate, finished, "--prompt=1+2+3=", eval__mixing=True, mixing__rate=1.0)
    assert "⟦" in capsys.readouterr().out
    _run(evaluate, finished, "--prompt=1+2+3=")
    printed = capsys.readouterr().out
    assert "mixing off" in printed and "⟦" not in printed
    assert printed.count("--- response") == 2


def test_export_is_the_checkpoint(finished, tmp_path, capsys):
    _run(export, finished, f"--out={tmp_path / 'out'}", "--step=latest")
    assert "exported   step 12" in capsys.readouterr().out
    for (_, ours), (_, theirs) in zip(_leaves(tmp_path / "out"), _leaves(finished / "export"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_report_makes_a_page(finished):
    report.main(["report", f"--workdir={finished}"])
    assert "Mean@" in (finished / "report.html").read_text()


def _model_without(finished, tmp_path, **config):
    """A copy of the starting model with keys of config.json changed."""
    copy = tmp_path / "model"
    shutil.copytree(finished / "warm_start", copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def _half_downloaded(finished, tmp_path):
    copy = _model_without(finished, tmp_path)
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


def _no_template(finished, tmp_path):
    copy = _model_without(finished, tmp_path)
    path = copy / "tokenizer_config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"})
    )
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    return copy


def _with_value(value):
    """A copy of the starting model with one weight of layer 1 replaced."""

    def make(finished, tmp_path):
        copy = _model_without(finished, tmp_path)
        tensors = safetensors.numpy.load_file(copy / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        safetensors.numpy.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def _with_adapter(finished, tmp_path):
    copy = _model_without(finished, tmp_path)
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return copy


def _with_template(text):
    def make(finished, tmp_path):
        copy = _no_template(finished, tmp_path)
        (copy / "chat_template.jinja").write_text(text)
        return copy

    return make


# Loops over the parts of a message's content; over a text it sees single characters.
PARTS = "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
PARTS += "{% endfor %}={% endfor %}"


def _without_stop_id(finished, tmp_path):
    copy = _model_without(finished, tmp_path, eos_token_id=None)
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (copy / name).exists():
            values = json.loads((copy / name).read_text())
            kept = {k: v for k, v in values.items() if k not in ("eos_token", "eos_token_id")}
            (copy / name).write_text(json.dumps(kept))
    return copy


def _problems(tmp_path, text):
    path = tmp_path / "problems.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return f"jsonl:{path}"


GOOD = '{"problem": "1+1=", "answer": "2"}\n'
REFUSALS = {
    "unknown setting": (
        ["--config.mixing.rat=0.1"],
        {},
        "--config.mixing.rat; did you mean --config.mixing.rate",
    ),
    "wrong type": ([], {"train__steps": "many"}, "many"),
    "rate": ([], {"mixing__rate": 1.5}, "mixing.rate is 1.5"),
    "k": ([], {"mixing__k": 200}, "mixing.k is 200"),
    "mesh": ([], {"mesh__data": 3}, "mesh.data 3"),
    "mesh axis": (
        [],
        {"mesh__data": 1, "mesh__tensor": 8},
        "2 key/value heads (K), which mesh.tensor = 8 does not divide",
    ),
    "row length": (
        [],
        {"train__row_tokens": 40},
        "train.row_tokens is 40, shorter than the longest sequence",
    ),
    "GSPO by token": (
        [],
        {"objective__algorithm": "gspo", "objective__aggregate": "token"},
        "objective.aggregate is 'token' with objective.algorithm 'gspo'",
    ),
    "offload": ([], {"train__offload": "both"}, "train.offload is 'both', but devices of cpu have no memory"),
    "attention": ([], {"train__attention": "cudnn"}, "train.attention is 'cudnn', which needs an NVIDIA GPU"),
    "mini-batches": ([], {"train__mini_batch_prompts": 3}, "rollout.prompts is 4, no multiple"),
    "removed setting": ([], {"rollout__top_p": 0.9}, "rollout.top_p has been removed"),
    "group of one": ([], {"rollout__group": 1}, "rollout.group is 1"),
    "no such model": ([], {"model__path": "no/such-model-anywhere"}, "no/such-model-anywhere"),
    "prompts too long": ([], {"data__max_prompt_tokens": 2}, "data.max_prompt_tokens = 2"),
    "unknown reward": ([], {"reward__kind": "maths"}, "maths"),
    "reward not importable": ([], {"reward__kind": "no_module:reward"}, "no_module"),
    "row without answer": ([], {"data__eval": lambda t: _problems(t, GOOD + '{"problem": "x"}\n')}, "row 2"),
    "empty data": ([], {"data__eval": lambda t: _problems(t, "")}, "empty"),
    "grading processes": ([], {"reward__workers": 2000}, "reward.workers is 2000"),
    "deadline": ([], {"reward__deadline_s": 1e300}, "reward.deadline_s is 1e+300"),
    "chunk": ([], {"rollout__chunk": 100_000}, "rollout.chunk is 100000"),
    "seed": ([], {"seed": 10**23}, "seed is 100000000000000000000000"),
    "warm-up": ([], {"optimizer__warmup_steps": 10**14}, "optimizer.warmup_steps is 100000000000000"),
    "group": ([], {"rollout__group": 10**9}, "responses a step; at most"),
    "an answer of 5000 digits": (
        [],
        {"data__eval": lambda t: _problems(t, f'{{"problem": "1", "answer": {"9" * 5000}}}\n')},
        "problems.jsonl line 1 is JSON with a whole number of more than 4300 digits",
    ),
    "a problem of 2 MB": (
        [],
        {"data__eval": lambda t: _problems(t, GOOD + f'{{"problem": "{"1+" * 10**6}", "answer": "2"}}\n')},
        "row 2: field 'problem' has 2000000 characters",
    ),
    "a line that is not UTF-8": (
        [],
        {"data__eval": lambda t: _problems(t, GOOD + '{"problem": "\udcff"}\n')},
        "problems.jsonl line 2 is not UTF-8 text",
    ),
    "an unknown change": (["--allow-changes=sed"], {}, "--allow-changes names sed"),
    "no data file": ([], {"data__eval": "jsonl:nowhere.jsonl"}, "nowhere.jsonl"),
    "warm start of other data": ([], {"data__train": lambda t: _problems(t, GOOD)}, "data.train"),
}
BROKEN_MODELS = {
    "half downloaded": (_half_downloaded, "model-00001-of-00002.safetensors"),
    "wrong shape": (
        lambda finished, path: _model_without(finished, path, intermediate_size=40),
        "model.layers.0.mlp.down_proj.weight",
    ),
    "no chat template": (_no_template, "data.chat_template"),
    "not a number": (
        _with_value(np.nan),
        "model.layers.1.mlp.up_proj.weight holds 1 values that are not finite",
    ),
    "infinite": (
        _with_value(-np.inf),
        "model.layers.1.mlp.up_proj.weight holds 1 values that are not finite",
    ),
    "an adapter": (_with_adapter, "adapter_config.json"),
    "a template of parts": (_with_template(PARTS), "the chat template leaves out the problem's text"),
    "no stop id": (_without_stop_id, "data.stop"),
    "unknown architecture": (
        lambda finished, path: _model_without(
            finished, path, architectures=["GPT2LMHeadModel"], model_type="gpt2"
        ),
        "gpt2",
    ),
}


def _refused(capsys, workdir, *more, **changes):
    """The one line that a refused training run prints."""
    with pytest.raises(SystemExit) as refusal:
        _run(train, workdir, *more, **changes)
    assert refusal.value.code == 2
    # On a slow machine lines of progress come before it.
    lines = [line for line in capsys.readouterr().err.split("\n") if line and " · " not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_sentence_and_leaves_the_workdir_alone(name, tmp_path, capsys):
    more, changes, culprit = REFUSALS[name]
    changes = {k: v(tmp_path) if callable(v) else v for k, v in changes.items()}
    workdir = tmp_path / "workdir"
    assert culprit in _refused(capsys, workdir, *more, **changes)
    assert not workdir.exists()


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_a_broken_model_is_named_and_the_workdir_left_alone(name, finished, tmp_path, capsys):
    make, culprit = BROKEN_MODELS[name]
    workdir = tmp_path / "workdir"
    assert culprit in _refused(capsys, workdir, model__path=make(finished, tmp_path))
    assert not workdir.exists()


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path, capsys):
    other = tmp_path / "other"
    _run(train, other, warm_start__num_layers=1, train__steps=1, eval__every=1)
    capsys.readouterr()
    before = sorted(path for path in finished.rglob("*"))
    sentence = _refused(capsys, finished, model__path=other / "warm_start", train__steps=14)
    assert "another model" in sentence and "--workdir" in sentence
    sentence = _refused(capsys, finished, model__path=finished / "warm_start", seed=1, train__steps=14)
    assert "seed 0, not 1" in sentence
    sentence = _refused(capsys, finished, rollout__temperature=0.5, train__steps=14)
    assert "rollout.temperature 1.0, not 0.5" in sentence
    assert sorted(path for path in finished.rglob("*")) == before


def test_a_finished_run_with_other_settings_is_refused_and_with_allowed_ones_told(finished, capsys):
    assert "optimizer.learning_rate 0.0002, not 0.001; use those" in _refused(
        capsys, finished, train__steps=12, optimizer__learning_rate=1e-3
    )
    _run(
        train,
        finished,
        "--allow-changes=optimizer.learning_rate",
        train__steps=12,
        optimizer__learning_rate=1e-3,
    )
    assert "holds a finished run of 12 steps" in capsys.readouterr().out


def _scaled(finished, tmp_path):
    copy = _model_without(finished, tmp_path)
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 3
    safetensors.numpy.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_resumed_run_has_the_model_and_the_held_out_answers_of_before_or_says_so(
    finished, tmp_path, capsys
):
    workdir, lines = (
        tmp_path / "run",
        [json.dumps({"problem": f"{i}+1=", "answer": str(i + 1)}) for i in range(4)],
    )
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(lines) + "\n")
    changes = {"data__eval": f"jsonl:{held_out}", "eval__every": 1, "reward__kind": "math"}
    _run(train, workdir, train__steps=1, **changes)
    capsys.readouterr()
    sentence = _refused(capsys, workdir, model__path=_scaled(workdir, tmp_path), train__steps=2, **changes)
    assert "is of another model" in sentence and "sum_of_weights" in sentence
    held_out.write_text("\n".join(lines).replace('"2"', '"3"') + "\n")
    sentence = _refused(capsys, workdir, train__steps=2, **changes)
    assert "the held-out problems have changed" in sentence and "--allow-changes=data.eval" in sentence
    (workdir / "metrics.jsonl").unlink()
    _run(train, workdir, "--allow-changes=data.eval", train__steps=2, **changes)
    printed = capsys.readouterr().out
    assert "resumed from step 1" in printed
    assert f"warning: {workdir}/metrics.jsonl has no rows of 1 steps that are done" in printed


def test_a_second_start_on_a_workdir_is_refused(finished, tmp_path, capsys):
    with held(tmp_path / "run"):
        assert "a run is under way in" in _refused(capsys, tmp_path / "run")


def test_a_workdir_that_is_empty_text_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refusal:
        _run(train, "")
    assert refusal.value.code == 2 and "--workdir=DIR is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vanish", [shutil.rmtree, lambda path: path.rename(path.with_name("moved"))])
def test_a_workdir_that_vanishes_ends_the_run_within_a_step(finished, tmp_path, monkeypatch, capsys, vanish):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    taken, whole_step = [], loop.train_step

    def vanishes(run, state, grader):
        taken.append(state.step)
        vanish(workdir) if len(taken) == 1 else None
        return whole_step(run, state, grader)

    monkeypatch.setattr(loop, "train_step", vanishes)
    with pytest.raises(SystemExit) as end:
        _run(train, workdir, train__steps=20, checkpoint__every=1)
    assert end.value.code == 1 and taken == [12]
    assert f"error: {workdir}/lock.json is gone" in capsys.readouterr().err


def test_export_uses_the_newest_checkpoint_that_is_whole_and_names_the_damaged_file(
    finished, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (data, *_) = (workdir / "checkpoints" / "12" / "state").glob("ocdbt.process_0/d/*")
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 1
    data.write_bytes(content)
    _run(export, workdir, f"--out={tmp_path / 'out'}", "--step=latest")
    printed = capsys.readouterr().out
    name = data.relative_to(workdir / "checkpoints" / "12")
    assert f"warning: checkpoint 12 is damaged: {name} (checksum)" in printed
    assert "exported   step 6 of" in printed
    with pytest.raises(SystemExit) as refusal:
        _run(export, workdir, f"--out={tmp_path / 'other'}", "--step=12")
    assert refusal.value.code == 2 and str(name) in capsys.readouterr().err


def test_a_stopped_evaluation_is_made_up_for_by_the_resumed_run(finished, tmp_path, monkeypatch, capsys):
    """Step 6 is finished and saved without its evaluation; its row, and its rank as the best, come later."""
    workdir, evaluate_whole = tmp_path / "run", loop.evaluate

    def stops(run, state, grader, label):
        if label == "evaluation":
            ending._deferred.received = 15
            raise ending.Abandoned
        return evaluate_whole(run, state, grader, label)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(loop, "evaluate", stops)
        _run(train, workdir, train__steps=12)
    assert end.value.code == 143
    assert "stopped by SIGTERM; the run in" in capsys.readouterr().err
    assert len(read_rows(workdir / "metrics.jsonl")) == 5
    assert (workdir / "checkpoints" / "6").is_dir()
    _run(train, workdir, train__steps=12)
    assert _timeless(workdir / "metrics.jsonl") == _timeless(finished / "metrics.jsonl")
    summaries = [json.loads((each / "summary.json").read_text()) for each in (workdir, finished)]
    assert summaries[0]["best_step"] == summaries[1]["best_step"]


def test_updates_that_are_not_finite_are_skipped_and_end_a_run_after_some(
    finished, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    learn = step.learn

    def diverges(*arguments):
        train_state, table, metrics = learn(*arguments)
        return train_state, table, metrics | {"learner/grad_norm": float("nan"), "learner/skipped": 0.5}

    monkeypatch.setattr(step, "learn", diverges)
    sentence = _refused(capsys, workdir, train__steps=20, train__max_bad_steps=3)
    assert "was not finite in 3 steps in a row, the last of them 15; the run in" in sentence
    assert "with a lower optimizer.learning_rate" in sentence
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == list(range(1, 16))
