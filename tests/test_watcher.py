"""The watcher beside a training process, on its own: what it bears, and what it says."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from ngrpo_jax.runtime import ending, watcher


@pytest.fixture
def first():
    """The watcher of process 0, whose parent is this process; its first message has been read."""
    command = [sys.executable, "-P", watcher.__file__, "0", str(os.getpid())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        process.heard = json.loads(process.stdout.readline())
        yield process
        process.kill()


def _connect(first):
    return socket.create_connection(("localhost", first.heard["port"]), timeout=10)


def _say(connection, message):
    connection.sendall(json.dumps(message).encode() + b"\n")


def _next(connection, name):
    """The next message that has `name`: others are signs of life."""
    for line in connection.makefile():
        message = json.loads(line)
        if name in message:
            return message
    raise AssertionError(f"the connection ended without {name}")


def _end_of(connection):
    """Reads until the other end lets go."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\xfe\n",
    b"[1]\n",
    b'{"hello": 1, "secret": "x"}\n',
    b"[" * 100_000 + b"\n",
]


def test_strangers_and_signals_end_no_watcher(first):
    for text in STRANGERS:
        with _connect(first) as stranger:
            stranger.sendall(text)
            _end_of(stranger)
    for number in watcher.IGNORED:
        first.send_signal(number)
    with _connect(first) as second:
        _say(second, {"hello": 1, "secret": first.heard["secret"]})
        first.stdin.write(json.dumps({"failed": "no room", "status": 3, "communication": False}) + "\n")
        first.stdin.flush()
        news = _next(second, "process")
    assert news == {"process": 0, "how": "failed", "text": "no room", "status": 3}
    assert json.loads(first.stdout.readline()) == {"news": None}
    first.stdin.close()
    assert first.wait(timeout=20) == 0 and first.stderr.read() == ""


def test_what_a_process_says_before_it_is_killed_is_told(first):
    with _connect(first) as second:
        _say(second, {"hello": 1, "secret": first.heard["secret"]})
        first.stdin.write(
            json.dumps({"failed": "connection lost", "status": 1, "communication": True}) + "\n"
        )
        first.stdin.close()
        first.stdout.close()
        assert _next(second, "process")["text"] == "connection lost"
    assert first.wait(timeout=20) == 0 and first.stderr.read() == ""


def test_a_line_without_end_is_no_message(first):
    with _connect(first) as stranger:
        try:
            for _ in range(40):
                stranger.sendall(b"x" * (watcher.LONGEST // 20))
            _end_of(stranger)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert first.poll() is None


def test_a_peer_that_breaks_off_is_the_news_and_ends_the_parent(tmp_path):
    """The parent is a process of its own, which waits for ever, and whose watcher kills it."""
    script = (
        "import subprocess, sys, os, time\n"
        f"w = subprocess.Popen([sys.executable, '-P', {watcher.__file__!r}, '0', str(os.getpid())],\n"
        "                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "print(w.stdout.readline(), end='', flush=True)\n"
        "time.sleep(600)\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True) as parent:
        parent.heard = json.loads(parent.stdout.readline())
        with _connect(parent) as second:
            _say(second, {"hello": 1, "secret": parent.heard["secret"]})
        assert parent.wait(timeout=30) == -signal.SIGKILL
        assert "process 1 of this run ended without a word" in parent.stderr.read()


def test_a_watcher_that_has_ended_is_one_sentence(monkeypatch):
    words = [sys.executable, "-c", "input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ends:
        monkeypatch.setattr(ending, "_watcher", ends)
        assert ending.announce_end("x", 1, communication=False) is None
        with pytest.raises(OSError, match="the watcher beside this process has ended"):
            ending._hear()
