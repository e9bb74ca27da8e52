"""Programs compiled for machines that are not here, and what is read from their text."""

import ast
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from ngrpo_jax.preflight import program_text, targets

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 517,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
}
SMALL = {
    "data.max_prompt_tokens": 128,
    "rollout.max_new_tokens": 896,
    "eval.max_new_tokens": 896,
    "rollout.slots": 16,
    "rollout.chunk": 2,
    "train.logprob_chunk": 256,
}
HERE = {"gpu": ("jax_cuda12_plugin", "nvidia"), "tpu": ("libtpu",)}
ASKS_THE_MACHINE = {"default_backend", "local_devices", "devices", "local_device_count", "device_count"}

TEXT = """
%body (p: f32[8]) -> f32[8] {
  %h = (bf16[4,8], f32[8]{0}) fusion(%p), calls=%fused
  %f = (bf16[4,8], f32[8]{0}) fusion(%p), calls=%fused, backend_config={"estimated_cycles":"10"}
}
%fused (p: f32[8]) -> bf16[4,8] {
  %again = bf16[4,8]{1,0} all-gather(%p), channel_id=3
}
%condition (p: s32[]) -> pred[] {
  %n = s32[] constant(6)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%p), condition=%condition, body=%body
  %r = f32[2]{0} reduce-scatter(%w), channel_id=4, backend_config={"estimated_cycles":"0"}
  %s = ((f32[8,2], s32[8]), (f32[1,2], s32[1])) reduce-scatter-start(%w), channel_id=5
  %x = f32[8]{0} fusion(%w), calls=%other, backend_config={"estimated_cycles":"7"}
}
"""


def test_cost_counts_loops_and_each_collective_once():
    cost, started = program_text.cost(TEXT), "reduce-scatter ((f32[8,2], s32[8]), (f32[1,2], s32[1]))"
    assert cost.cycles == 6 * 10 + 7
    assert cost.collective_bytes == {"all-gather bf16[4,8]": 6 * 64, "reduce-scatter f32[2]": 8, started: 12}


@pytest.mark.parametrize("room", ["model", "rollout", "learner", "algo"])
def test_no_program_asks_the_machine_that_it_is_compiled_on(room):
    for path in (ROOT / "ngrpo_jax" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "jax"
            ):
                assert node.attr not in ASKS_THE_MACHINE, f"{path}:{node.lineno}"


@pytest.mark.parametrize("target", ["v5e", "v5e:", "v5e:2xa", "v9:2x2", "h100:0", "h100:9", "h100:2x4", ""])
def test_an_unknown_target_is_refused_with_those_known(target):
    with pytest.raises(ValueError, match=rf"--target={target} is unknown; use one of v5e:2x4, .*h100:8"):
        targets.devices(target)


def test_a_missing_compiler_is_one_sentence_with_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the compiler for TPUs .*pip install -e '\.\[aot-tpu\]'"):
        targets.devices("v5e:2x4")
    with pytest.raises(ValueError, match=r"needs the compiler for GPUs .*pip install -e '\.\[aot-cuda12\]'"):
        targets.devices("h100:8")


def _installed(kind):
    return all(importlib.util.find_spec(name) for name in HERE[kind])


def _forecast(tmp_path, target, mesh, **more):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    given = {"model.path": tmp_path / "model", **SMALL, **more}
    given |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    words = [f"--config.{name}={value}" for name, value in given.items()]
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "ngrpo_jax.train", "--preflight", f"--target={target}", f"--json={out}"]
    done = subprocess.run(
        [*command, f"--config={ROOT}/configs/base.py", *words],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")},
        capture_output=True,
        text=True,
    )
    rows = {row["program"]: row for row in json.loads(out.read_text())} if out.exists() else {}
    return done.returncode, rows, done.stdout + done.stderr


@pytest.mark.skipif(not _installed("gpu"), reason="needs the extra aot-cuda12")
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 4, 2)])
def test_every_program_compiles_for_eight_gpus(tmp_path, mesh):
    status, rows, said = _forecast(tmp_path, "h100:8", mesh)
    assert status == 0, said
    assert {"accumulate", "score float32", "training prefill", "training decode_chunk", "table"} <= set(rows)
    assert rows["accumulate"]["attention"] == "cudnn"
    assert all(row["compiled"] and 0 < row["total_gib"] < row["device_gib"] for row in rows.values())
    assert mesh[2] > 1 or rows["training decode_chunk"]["collective_gb"] == 0


@pytest.mark.long
@pytest.mark.skipif(not _installed("tpu"), reason="needs the extra aot-tpu")
def test_every_program_compiles_for_a_tpu_slice(tmp_path):
    status, rows, said = _forecast(tmp_path, "v5e:2x4", (1, 8, 1))
    assert status == 0, said
    assert rows["accumulate"]["attention"] == "splash" and rows["accumulate"]["milliseconds"] > 0
    assert rows["training decode_chunk"]["collective_gb"] == 0
