"""Real processes under launch/gpu/local.sh: when one ends, it is named, and all end within a minute."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HEARTBEAT_S = 10


def _run(folder, kind, victim, processes=2):
    """(the finished launcher, seconds from the end of `victim` to its own, the log of each process)."""
    python = folder / "python"
    words = [sys.executable, ROOT / "tests" / "ending_process.py", HEARTBEAT_S, kind, victim]
    python.write_text("#!/bin/bash\nexec " + " ".join(f"'{word}'" for word in words) + "\n")
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "XLA_", "NGRPO_"))}
    environment = kept | {
        "NGRPO_PYTHON": str(python),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = ["bash", str(ROOT / "launch" / "gpu" / "local.sh"), "--config=c.py", f"--workdir={folder}"]
    result = subprocess.run(
        [*script, f"--processes={processes}", f"--port={port}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    ended = time.time()
    logs = [(folder / "logs" / f"process-{index}.log").read_text() for index in range(processes)]
    deaths = [float(found) for log in logs for found in re.findall(r"death at (\S+)", log)]
    assert len(deaths) == processes, logs
    return result, ended - max(deaths), logs


CASES = [
    ("kill", 1, 137, ""),
    ("term", 1, 143, ""),
    ("bug", 0, 1, "TypeError: shapes differ"),
    ("user", 1, 2, "error: this file is no data file."),
    pytest.param("kill", 0, 137, "", marks=pytest.mark.long),
    pytest.param("exit", 1, 3, "", marks=pytest.mark.long),
    pytest.param("bug", 1, 1, "TypeError: shapes differ", marks=pytest.mark.long),
    pytest.param("storage", 1, 1, "error: /share/x cannot be written", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("kind", "victim", "status", "words"), CASES)
def test_all_end_within_a_minute_of_the_first_and_it_is_named(tmp_path, kind, victim, status, words):
    launcher, seconds, logs = _run(tmp_path, kind, victim)
    assert launcher.returncode == status, (launcher.stderr, logs)
    assert f"error: process {victim} ended with status {status}" in launcher.stderr
    assert words in logs[victim]
    assert seconds < 60, (seconds, logs)
    survivor = logs[1 - victim]
    named = r"unhealthy \(stopped sending heartbeats\):\n1\n" if victim else "coordination_service"
    assert re.search(named, survivor), survivor
    assert words == "" or words not in survivor


def test_what_all_processes_find_wrong_is_said_by_each_with_status_2(tmp_path):
    launcher, _, logs = _run(tmp_path, "all", 0)
    assert launcher.returncode == 2, (launcher.stderr, logs)
    for index, log in enumerate(logs):
        assert f"process {index} ended with status 2" in launcher.stderr
        assert log.count("error: ") == 1 and "error: this file is no data file." in log


def test_processes_at_different_exchanges_end_with_a_sentence(tmp_path):
    launcher, _, logs = _run(tmp_path, "names", 1)
    assert launcher.returncode == 1, (launcher.stderr, logs)
    for log in logs:
        assert "must make the same exchanges in the same order" in log
