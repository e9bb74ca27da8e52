"""Files replaced whole, JSON lines, and storage that fails."""

import errno
import os

import pytest

from ngrpo_jax import files
from ngrpo_jax.errors import StorageError, UserError


def test_lines_have_numbers_values_and_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    text = '\ufeff{"x": "\u2028"}\n\n[1]\r\n3'.encode()
    path.write_bytes(text)
    lines = list(files.read_jsonl(path))
    assert [(line.number, line.value) for line in lines] == [(1, {"x": "\u2028"}), (3, [1]), (4, 3)]
    assert text[: lines[1].end].endswith(b"[1]\r\n") and lines[2].end == len(text)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "line 2 is not JSON"),
        (b"\xff", "line 2 is not UTF-8 text"),
        (b"[" * 100_000, "line 2 is JSON nested too deeply"),
        (b"1" * 5000, "line 2 is JSON with a whole number of more than 4300 digits"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, fault):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + line + b"\n3\n")
    with pytest.raises(UserError, match=f"a.jsonl {fault}"):
        list(files.read_jsonl(path, unfinished=True))


@pytest.mark.parametrize("tail", [b"2", b'{"x', b"\x00\x00\n", b"{\n"])
def test_only_an_unfinished_last_line_may_be_left_out(tmp_path, tail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + tail)
    assert [line.value for line in files.read_jsonl(path, unfinished=True)] == [1]
    if tail != b"2":
        with pytest.raises(UserError, match="line 2"):
            list(files.read_jsonl(path))


def test_a_missing_file_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        list(files.read_jsonl(tmp_path / "nowhere.jsonl"))


def test_a_full_disk_is_a_storage_error_that_names_the_file_and_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json(path, {"steps": 3})
    before = path.read_text()

    def replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageError, match=r"summary\.json cannot be written: No space left on device"):
        files.write_json(path, {"steps": 4})
    assert path.read_text() == before
