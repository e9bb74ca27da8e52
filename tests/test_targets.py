"""Programs compiled for machines that are not here, and what is read from their text."""

import ast
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest
from jax.experimental import topologies

from ngrpo_jax.errors import UserError
from ngrpo_jax.flags import load_config
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import forecast, memory, program_text, targets
from ngrpo_jax.settings import resolve

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
MESHES = ("8.1.1", "1.8.1", "2.4.1", "1.4.2")  # data, fsdp, tensor
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


def test_rollouts_of_several_hosts_compile_for_one_host_as_a_slice(monkeypatch):
    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    described = []
    monkeypatch.setattr(targets, "_tpus", lambda name, known: described.append(name) or ["own"])
    four = [Device(index // 4) for index in range(16)]
    assert targets.host_devices("v5e:4x4", four) == ["own"]
    assert targets.host_devices("v5p:2x2x4", four) == ["own"]
    assert described == ["v5e:2x2", "v5p:2x2x1"]
    one = [Device(0)] * 8
    assert targets.host_devices("v5e:2x4", one) is one and len(described) == 2


def test_what_waits_beside_an_update_has_the_rows_from_before_it():
    settings = resolve(load_config(str(ROOT / "configs" / "base.py"))).with_slots(64)
    rows = 4 * 151936 * 1536
    model = ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, dtype="bfloat16")
    state = {one.name: one.size for one in memory.training_estimate(settings, model)}
    always = sum(one.size for one in memory.training_estimate(settings, model) if one.phase == "always")
    master = state["master parameters, float32"]
    assert forecast._waiting("accumulate", settings, model) == always - master + rows
    assert forecast._waiting("table", settings, model) == always - rows
    assert forecast._waiting("score float32", settings, model) == always - master


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("Internal error when accessing libtpu multi-process lockfile", "another process holds .*end that"),
        ("Unsupported topology: 3x3", "v5e:3x3 is unknown; use one of .*Unsupported topology"),
    ],
)
def test_what_libtpu_refuses_is_one_sentence(monkeypatch, said, sentence):
    def refuse(**_):
        raise ValueError(said)

    monkeypatch.setattr(targets, "_found", lambda module: True)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=sentence):
        targets.devices("v5e:3x3")


def test_programs_compile_side_by_side_and_what_takes_long_is_told(monkeypatch, capsys):
    monkeypatch.setattr(forecast, "_QUIET_S", 0.01)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    quick_ended, said = threading.Event(), []

    def slow():
        assert quick_ended.wait(60)
        while "compiling slow" not in "".join(said) and len(said) < 6000:
            time.sleep(0.01)
            said.append(capsys.readouterr().out)
        return forecast.Row("slow", False, 0.0, problem="no")

    def quick():
        quick_ended.set()
        return forecast.Row("quick", False, 0.0, problem="no")

    rows = forecast.compiled({"slow": slow, "quick": quick})
    assert [row.program for row in rows] == ["slow", "quick"]
    text = "".join(said) + capsys.readouterr().out
    assert text.index("quick ") < text.index("compiling slow") < text.index("slow     ")


def _installed(kind):
    return all(importlib.util.find_spec(name) for name in HERE[kind])


def _settings(tmp_path, **more):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return {"model.path": str(folder), **SMALL, **more}


def _python(*words):
    """(exit status, standard output) of a Python without the flags of these tests."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr * bool(done.returncode)


def _forecast(tmp_path, target, **more):
    """(exit status, rows by program, what was said) of train --preflight --target."""
    words = [f"--config.{name}={value}" for name, value in _settings(tmp_path, **more).items()]
    words += [f"--target={target}", f"--json={tmp_path}/rows.json", f"--config={ROOT}/configs/base.py"]
    status, said = _python("-m", "ngrpo_jax.train", "--preflight", *words)
    rows = tmp_path / "rows.json"
    return (
        status,
        {row["program"]: row for row in json.loads(rows.read_text())} if rows.exists() else {},
        said,
    )


@pytest.mark.skipif(not _installed("gpu"), reason="needs the extra aot-cuda12")
def test_update_and_decoding_compile_for_eight_gpus_on_every_kind_of_mesh(tmp_path):
    given = json.dumps(_settings(tmp_path))
    names = "accumulate,score float32,training decode_chunk"
    status, said = _python("tests/target_programs.py", "h100:8", given, names, *MESHES)
    assert status == 0, said
    for grid, rows in json.loads(said.rstrip().rpartition("\n")[2]).items():
        assert {row["problem"] for row in rows.values()} == {None}, (grid, rows)
        assert rows["accumulate"]["attention"] == "cudnn"
        assert all(0 < row["total_gib"] < row["device_gib"] for row in rows.values())
        assert grid == "1.4.2" or rows["training decode_chunk"]["collective_gb"] == 0


@pytest.mark.long
@pytest.mark.parametrize(("kind", "target"), [("gpu", "h100:8"), ("tpu", "v5e:2x4")])
def test_every_program_compiles_for_a_machine_that_is_not_here(tmp_path, kind, target):
    if not _installed(kind):
        pytest.skip("needs the extra aot-cuda12 or aot-tpu")
    status, rows, said = _forecast(tmp_path, target, **{"mesh.fsdp": 8})
    assert status == 0, said
    assert {"accumulate", "score float32", "training prefill_layer", "training decode_chunk", "table"} <= set(
        rows
    )
    assert all(row["compiled"] and 0 < row["total_gib"] < row["device_gib"] for row in rows.values())
    assert rows["accumulate"]["attention"] == {"gpu": "cudnn", "tpu": "splash"}[kind]
    assert (rows["accumulate"]["milliseconds"] is None) == (kind == "gpu")
    assert rows["training decode_chunk"]["collective_gb"] == 0


@pytest.mark.long
@pytest.mark.skipif(not _installed("gpu"), reason="needs the extra aot-cuda12")
def test_rows_and_slots_beyond_memory_are_failing_rows_with_the_setting_to_change(tmp_path):
    given = json.dumps(_settings(tmp_path, **{"rollout.slots": 2**20, "train.rows_per_device": 2**14}))
    names = "score float32,training decode_chunk"
    status, said = _python("tests/target_programs.py", "h100:8", given, names, "1.8.1")
    assert status == 0, said
    score, decode = json.loads(said.rstrip().rpartition("\n")[2])["1.8.1"].values()
    assert "GiB; lower train.rows_per_device" in score["problem"]
    assert "GiB; lower rollout.slots" in decode["problem"]


def _decode_body(target):
    """The decode program but for what stands before and after its loop over steps."""
    command = [sys.executable, str(ROOT / "tests" / "target_decode.py"), target]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\nENTRY ")[0]


KERNELS = {"h100:1": "__gpu$xla.gpu.triton", "v5e:2x4": "tpu_custom_call"}


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(
            "h100:1", marks=pytest.mark.skipif(not _installed("gpu"), reason="needs the extra aot-cuda12")
        ),
        pytest.param(
            "v5e:2x4",
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(not _installed("tpu"), reason="needs the extra aot-tpu"),
            ],
        ),
    ],
)
def test_a_decode_step_reads_the_ring_in_place(target):
    """By the kernel of the platform, with no copy of a layer's cache or of a weight."""
    body = _decode_body(target)
    assert body.count(f'custom_call_target="{KERNELS[target]}"') == 2, "a layer"
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", body)
    sizes = [math.prod(map(int, dims.split(","))) for dims in copies]
    assert max(sizes) < 512 * 512 // 4, "elements of a quarter of the smallest weight"
