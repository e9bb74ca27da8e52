"""train --preflight: a good config passes, and each planted fault is named by its own row."""

import re
import time

import pytest
from test_commands import TINY, _argv

from ngrpo_jax import flags, train
from ngrpo_jax.errors import UserError
from ngrpo_jax.flags import load_config
from ngrpo_jax.preflight import checklist, fit, memory, programs
from ngrpo_jax.preflight.checklist import Check
from ngrpo_jax.settings import resolve


def _table(capsys, argv):
    """(exit status, row name -> (verdict, remark)) of a preflight."""
    with pytest.raises(SystemExit) as ended:
        flags.run_command(train.main, [*argv, "--preflight"])
    lines = capsys.readouterr().out.split("\n")[2:]
    rows = {}
    for line in lines[: lines.index("")]:
        name, verdict, remark = re.split("  +", line, maxsplit=2)
        rows[name] = (verdict, remark)
    return ended.value.code, rows


def test_tiny_passes_in_under_a_minute_and_leaves_nothing(tmp_path, capsys):
    """The config as it is, but for the eight devices of the tests."""
    workdir = tmp_path / "run"
    argv = ["train", f"--config={TINY}", f"--workdir={workdir}", "--config.mesh.data=8"]
    begun = time.process_time()
    status, rows = _table(capsys, [*argv, "--config.train.rows_per_device=4"])
    assert status == 0 and {verdict for verdict, _ in rows.values()} == {checklist.OK}, rows
    assert len(rows) == 19 and not workdir.exists()
    assert time.process_time() - begun < 60
    assert "most in the update" in rows["memory"][1]
    # tiny has two optimiser steps a batch, so that old log-probabilities are computed; and a reference:
    # accumulate, score float32, zeros, apply. Seven programs of a rollout, in training and in evaluation.
    assert rows["update programs"][1].startswith("4 compiled in ")
    assert rows["rollout programs"][1].startswith("14 compiled in ")


def _refuses(*_):
    raise RuntimeError("the compiler has no such operation")


FAULTS = {
    "settings": ({"train__row_tokens": 8}, "train.row_tokens is 8"),
    "mesh": ({"mesh__data": 3}, "mesh.data 3"),
    "model": ({"model__path": "no/such-model-anywhere"}, "no/such-model-anywhere"),
    "tokenizer": ({"data__chat_template": "missing.jinja"}, "missing.jinja"),
    "sizes": ({"rollout__max_new_tokens": 5000, "train__row_tokens": 6000}, "4096 positions"),
    "mixing": ({"mixing__k": 200}, "mixing.k is 200"),
    "training data": ({"data__train": "arithmetic:digits=0"}, "digits"),
    "held-out data": ({"data__eval": "jsonl:nowhere.jsonl"}, "nowhere.jsonl"),
    "reward": ({"reward__kind": "maths"}, "maths"),
    "sharding": ({"mesh__data": 1, "mesh__tensor": 8}, "mesh.tensor"),
    "memory": ({"rollout__slots": 10**9}, "rollout.slots"),
}


@pytest.fixture
def compiles_nothing(monkeypatch):
    monkeypatch.setattr(programs, "update_programs", lambda *_: {})
    monkeypatch.setattr(programs, "rollout_programs", lambda *_: {})


def _assert_only(rows, name, named):
    failed = {row for row, (verdict, _) in rows.items() if verdict == checklist.FAILED}
    assert failed == {name}, rows
    assert named in rows[name][1]
    for verdict, remark in rows.values():
        assert verdict != checklist.SKIPPED or remark.startswith("needs ")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_settings_is_named_by_its_row(tmp_path, capsys, compiles_nothing, name):
    changes, named = FAULTS[name]
    status, rows = _table(capsys, _argv(tmp_path / "run", **changes))
    assert status == 2
    _assert_only(rows, name, named)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "90"),
        ("LIBTPU_INIT_ARGS", "xla_tpu_flag=1"),
        ("JAX_PROCESS_ID", "0"),
        ("JAX_COMPILATION_CACHE_DIR", "FILE/cache"),
    ],
)
def test_a_fault_of_the_environment_is_named(
    tmp_path, capsys, monkeypatch, compiles_nothing, variable, value
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, value.replace("FILE", str(tmp_path / "file")))
    status, rows = _table(capsys, _argv(tmp_path / "run"))
    assert status == 2
    _assert_only(rows, "environment", variable)


def test_faults_of_the_workdir_and_its_disk_are_named(tmp_path, capsys, monkeypatch, compiles_nothing):
    (tmp_path / "file").touch()
    _, rows = _table(capsys, _argv(tmp_path / "file" / "run"))
    assert rows["workdir"][0] == checklist.FAILED and "is a file" in rows["workdir"][1]
    monkeypatch.setattr(memory, "checkpoint_bytes", lambda model, kept: 1 << 60)
    status, rows = _table(capsys, _argv(tmp_path / "run"))
    assert status == 2
    _assert_only(rows, "checkpoints", "need 1048576 TiB")


def test_a_program_that_does_not_compile_is_named(tmp_path, capsys, monkeypatch, compiles_nothing):
    monkeypatch.setattr(programs, "update_programs", _refuses)
    status, rows = _table(capsys, _argv(tmp_path / "run"))
    assert status == 2 and rows["rollout programs"][0] == checklist.OK
    _assert_only(rows, "update programs", "the compiler has no such operation")


def test_a_check_that_fails_stops_only_those_that_need_it():
    def fails(_):
        raise UserError("a sentence\nof two lines")

    def breaks():
        return {}["nothing"]

    rows, results = checklist.run_checks(
        [
            Check("first", lambda number: (number + 1, "added"), ("given",)),
            Check("second", fails, ("first",)),
            Check("third", lambda _: (0, "never"), ("second",)),
            Check("fourth", lambda number: (2 * number, "doubled"), ("first",)),
            Check("fifth", breaks),
        ],
        {"given": 3},
    )
    assert rows == [
        ("first", checklist.OK, "added"),
        ("second", checklist.FAILED, "a sentence of two lines"),
        ("third", checklist.SKIPPED, "needs second"),
        ("fourth", checklist.OK, "doubled"),
        ("fifth", checklist.FAILED, "KeyError: 'nothing'"),
    ]
    assert results == {"given": 3, "first": 4, "fourth": 8}
    assert checklist.table(rows).endswith("\n\n2 of 5 checks failed.")


def test_rows_of_several_processes_have_the_worst_verdict_and_name_its_process():
    good, bad = ["disk", checklist.OK, "free"], ["disk", checklist.FAILED, "full"]
    skipped = ["model", checklist.SKIPPED, "needs disk"]
    found = ["model", checklist.OK, "there"]
    assert checklist.merge([[good, found], [bad, skipped], [bad, found]]) == [
        ("disk", checklist.FAILED, "process 1: full"),
        ("model", checklist.SKIPPED, "process 1: needs disk"),
    ]
    assert checklist.merge([[bad, found]]) == [tuple(bad), tuple(found)]


def test_prompts_that_hosts_cannot_share_are_refused():
    settings = resolve(load_config(str(TINY)))
    fit.check_hosts(settings, 4)
    with pytest.raises(ValueError, match=r"rollout\.prompts is 32, no multiple of the 3 processes"):
        fit.check_hosts(settings, 3)
