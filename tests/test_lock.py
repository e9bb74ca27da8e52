"""One run a workdir: who is refused, whose lock is taken over, what is left behind."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from ngrpo_jax.errors import StorageError, UserError
from ngrpo_jax.runtime import lock
from ngrpo_jax.runtime.lock import held

ROOT = pathlib.Path(__file__).parent.parent
HOLD = """
import pathlib, sys, time
from ngrpo_jax.runtime.lock import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_of_the_first(other, tmp_path):
    with pytest.raises(UserError) as refusal, held(tmp_path / "run"):
        pass
    assert re.search(rf"process {other.pid} on host {os.uname().nodename} since \d{{4}}-", str(refusal.value))
    assert (tmp_path / "run" / lock.NAME).exists()


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once(other, tmp_path):
    other.kill()
    other.wait()
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("age", "refused"), [(0, True), (-60, True), (170, True), (190, False), (-190, False)]
)
def test_the_lock_of_another_host_counts_for_three_minutes(tmp_path, age, refused):
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": 0.0}))
    os.utime(path, (time.time() - age,) * 2)
    if refused:
        with pytest.raises(UserError, match="process 7 on host elsewhere since 1970"), held(tmp_path):
            pass
    else:
        with held(tmp_path) as mine:
            mine.check()


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED_S", 0.01)
    with held(tmp_path):
        os.utime(tmp_path / lock.NAME, (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / lock.NAME).stat().st_mtime < 1:
            assert time.monotonic() < end


def test_nothing_is_left_where_nothing_was(tmp_path):
    with held(tmp_path / "deep" / "run"):
        pass
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_workdir_that_vanished_or_was_replaced_is_noticed(tmp_path):
    with held(tmp_path / "run") as mine:
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(StorageError, match=r"run/lock.json is gone"):
            mine.check()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / lock.NAME).write_text("another's")
        with pytest.raises(StorageError, match=r"run/lock.json is gone"):
            mine.check()
    assert (tmp_path / "run" / lock.NAME).read_text() == "another's"


def test_a_process_of_several_that_is_not_the_first_holds_nothing(tmp_path):
    with held(tmp_path / "run", primary=False) as none:
        assert none is None and not (tmp_path / "run").exists()
