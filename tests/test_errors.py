"""Errors: which exit status and which words end a command, and what an OSError of a named file becomes."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from ngrpo_jax.errors import Preempted, StorageError, UserError, explained, storage
from ngrpo_jax.flags import run_command

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("rollout.group is 1;\nit must be 2."), 2, "error: rollout.group is 1; it must be 2.\n"),
        (FloatingPointError("the loss is not finite."), 2, "error: the loss is not finite.\n"),
        (StorageError("runs/a cannot be written: full."), 1, "error: runs/a cannot be written: full.\n"),
        (Preempted(signal.SIGTERM, "go on."), 128 + 15, "stopped by SIGTERM; go on.\n"),
    ],
)
def test_a_known_end_is_one_sentence(error, status, words, capsys):
    def command(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(command, ["train"])
    assert (end.value.code, capsys.readouterr().err) == (status, words)


def test_a_full_disk_is_one_sentence_with_the_path_wherever_it_is_met(capsys):
    def command(argv):
        raise FULL

    with pytest.raises(SystemExit) as end:
        run_command(command, ["train"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and "runs/a/metrics.jsonl" in said


@pytest.mark.parametrize(
    "error", [ValueError("shapes differ"), ImportError("no module x"), OSError("a stray one"), KeyError("x")]
)
def test_a_mistake_of_the_program_keeps_its_traceback(error, capsys):
    def command(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(command, ["train"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" in said and "raise error" in said


def test_ngrpo_debug_shows_where_a_sentence_comes_from(monkeypatch, capsys):
    def command(argv):
        raise UserError("mended by hand.")

    monkeypatch.setenv("NGRPO_DEBUG", "1")
    with pytest.raises(SystemExit):
        run_command(command, ["train"])
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("error: mended by hand.\n")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.EROFS])
def test_a_file_that_was_named_wrongly_is_the_users_to_mend(number):
    with pytest.raises(UserError, match=r"data\.jsonl cannot be read: "), storage("data.jsonl"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_storage_that_fails_is_a_storage_error(number):
    sentence = rf"^metrics\.jsonl cannot be written: {os.strerror(number)}\.$"
    with pytest.raises(StorageError, match=sentence), storage("metrics.jsonl", "written"):
        raise OSError(number, os.strerror(number))


def test_other_os_errors_pass_as_they_are():
    with pytest.raises(ConnectionResetError), storage("data.jsonl"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("module", ["errors", "choices", "flags"])
def test_these_modules_import_no_jax(module):
    code = f"import sys, ngrpo_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError(" odd\nand long"), UserError, "it is wrong (odd); mend it"),
        (UserError("x is 1."), UserError, "x is 1."),
        (FULL, OSError, str(FULL)),
        (KeyError("x"), KeyError, "'x'"),
    ],
)
def test_only_what_the_user_can_mend_is_explained_and_that_once(error, kind, text):
    with pytest.raises(kind) as caught, explained((ValueError, OSError), "it is wrong", "mend it"):
        raise error
    assert type(caught.value) is kind and str(caught.value) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_a_character_is_no_reason_to_end(encoding):
    code = (
        "from ngrpo_jax.flags import run_command\n"
        "run_command(lambda argv: print('2 prompts × 4 ∑', flush=True), ['train'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    shown = {"ascii": b"x 4 \\u2211", "latin-1": b"\xd7 4 \\u2211", "utf-8": "× 4 ∑".encode()}
    assert done.stdout.strip() == b"2 prompts " + shown[encoding]
