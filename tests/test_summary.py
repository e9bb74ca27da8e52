"""What a run says at its end, and how its processes get there together."""

import types

import jax.numpy as jnp
import pytest

from ngrpo_jax.run import summary
from ngrpo_jax.runtime import distributed, files


@pytest.mark.parametrize("index", [0, 1])
def test_every_process_waits_until_the_first_has_exported(monkeypatch, index):
    done = []
    monkeypatch.setattr(distributed, "place", lambda: distributed.Process(index, 2))
    monkeypatch.setattr(distributed, "exchange", lambda name, value: done.append("together"))
    monkeypatch.setattr(summary, "_write", lambda *_: done.append("written"))
    state = types.SimpleNamespace(state=types.SimpleNamespace(params={"w": jnp.ones(2)}))
    summary.finish(None, state, {}, None, 1.0)
    assert done == (["written", "together"] if index == 0 else ["together"])


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 1')
    with pytest.raises(ValueError, match=r"summary\.json is no JSON .*; remove it") as refusal:
        summary.already_finished(types.SimpleNamespace(), tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json(path, {"steps": 1})

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"steps": 2})
    assert path.read_text() == '{\n "steps": 1\n}\n'
