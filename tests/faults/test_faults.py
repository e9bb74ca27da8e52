"""Faults in short: mutated input in this process, and the real command with two starts and two signals."""

import re
import signal
import subprocess
import sys
import time

import command
import fuzz
import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return fuzz.make_model(tmp_path_factory.mktemp("made") / "model")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_input_is_accepted_or_refused_in_a_sentence(kind, made, tmp_path):
    outcomes = {seed: fuzz.one(kind, seed, tmp_path / str(seed), made) for seed in range(20)}
    assert not {seed: one for seed, one in outcomes.items() if one[1] == "failed"}
    assert {one[1] for one in outcomes.values()} == {"accepted", "refused"}


def test_the_second_start_is_refused_and_signals_end_the_first(tmp_path):
    workdir = tmp_path / "run"
    first = command.start(workdir)
    try:
        end = time.monotonic() + 120
        while not (workdir / "lock.json").exists():
            assert first.poll() is None and time.monotonic() < end, command.said(workdir)
            time.sleep(0.05)
        second = command.start(workdir)
        second.wait()
        said = command.said(workdir)
        assert second.returncode == 2
        assert re.search(
            rf"error: a run is under way in {workdir} already: process {first.pid} on host", said
        )
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
    finally:
        first.kill()
    said = command.said(workdir)
    assert "stopped by SIGTERM; no step was finished" in said
    assert "Traceback" not in said
    assert not workdir.exists() or {path.name for path in workdir.iterdir()} <= {
        "warm_start",
        "warm_start.json",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="processes and their ends as Linux has them")
@pytest.mark.long
def test_a_run_that_is_killed_and_stopped_ends_as_one_that_is_not(tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert command.start(whole).wait() == 0
    for number, step in ((signal.SIGKILL, 3), (signal.SIGTERM, 6)):
        process = command.start(workdir)
        while not (workdir / "checkpoints" / str(step)).exists():
            assert process.poll() is None, command.said(workdir)
            time.sleep(0.02)
        process.send_signal(number)
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM and "the same command is started again" in command.said(
        workdir
    )
    assert command.start(workdir).wait() == 0, command.said(workdir)
    assert command.differences(workdir, whole) == []


@pytest.mark.long
def test_a_full_disk_is_one_sentence_with_its_path_and_the_run_goes_on_when_there_is_room(tmp_path):
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        process = command.start(tmp_path / "run", f"--workdir={disk / 'run'}")
        assert process.wait() == 1
        *_, last = command.said(tmp_path / "run").splitlines()
        assert re.fullmatch(rf"error: .*{disk}/run.*No space left on device\.", last)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert command.start(tmp_path / "run", f"--workdir={disk / 'run'}").wait() == 0
        assert command.start(whole).wait() == 0
        assert not command.differences(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
