"""Preflight: shares of memory against real trees and XLA's own account, remedies, workdirs as they come."""

import dataclasses
import errno
import math
import os
import pathlib

import jax
import pytest

from ngrpo_jax.algo.neighbors.eligibility import eligible_rows
from ngrpo_jax.errors import UserError
from ngrpo_jax.flags import load_config
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import capacity, memory, programs
from ngrpo_jax.preflight.memory import Allocation
from ngrpo_jax.rollout.shapes import largest_programs
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.learner import make_learner
from ngrpo_jax.setup.policy import abstract_policy, training_request
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo

GIB = 1024**3
BASE = pathlib.Path(__file__).parent.parent / "configs" / "base.py"
R1_1_5B = ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, dtype="bfloat16")
# What is only compiled: matrices and rows so large that they dwarf everything that the estimate leaves out.
LARGE = ModelConfig("qwen2", 32768, 1024, 4096, 1, 8, 4, 128)
SPLIT = {
    "mesh__fsdp": 4,
    "mesh__tensor": 2,
    "model__dtype": "float32",
    "data__max_prompt_tokens": 256,
    "rollout__max_new_tokens": 1792,
    "rollout__slots": 64,
    "rollout__chunk": 1,
    "eval__max_new_tokens": 1792,
    "train__rows_per_device": 2,
    "train__logprob_chunk": 512,
    "objective__old_logprobs": "sampler",
    "objective__kl_coef": 0.0,
}


def _settings(**changes):
    """The settings of configs/base.py on eight devices, with changes `section__leaf=value`."""
    config = load_config(str(BASE))
    changes = {"mesh__fsdp": 8, "rollout__slots": 64} | changes
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return resolve(config)


def _estimate(attention="chunked", **changes):
    return memory.training_estimate(_settings(**changes), R1_1_5B, attention=attention)


def _sizes(**changes):
    return {one.name: one.size for one in _estimate(**changes)}


def _split(config=LARGE, **changes):
    """(settings, devices, size by name) of a large model split over eight devices."""
    settings = _settings(**SPLIT | changes)
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    return settings, devices, {one.name: one.size for one in memory.training_estimate(settings, config)}


def _on_one_device(shapes, shardings):
    """Bytes that the leaves of a tree take on one device."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )


def test_master_parameters_and_moments_are_the_learners_state_on_one_device():
    settings, devices, sizes = _split()
    learner = make_learner(settings, LARGE, devices)
    parameters = _on_one_device(learner.abstract.params, learner.shardings.params)
    moments = _on_one_device(learner.abstract.opt_state, learner.shardings.opt_state)
    # Norms are whole on each device, which the estimate leaves out.
    assert sizes["master parameters, float32"] == pytest.approx(parameters, rel=0.01)
    assert sizes["Adam moments, float32"] == pytest.approx(moments, rel=0.01)
    state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(learner.abstract))
    assert memory.checkpoint_bytes(LARGE, kept=2) == pytest.approx(3 * state, rel=0.01)


@pytest.mark.parametrize("layout", ["tensor", "replicated"])
def test_a_rollouts_share_is_what_its_programs_take(layout):
    settings, devices, sizes = _split(rollout__layout=layout)
    info = TokenizerInfo(None, (), settings.mixing.method(()), eligible_rows(LARGE.vocab_size, 1))
    policy = abstract_policy(LARGE, info, devices, layout)
    programs_of = largest_programs(policy.params, training_request(policy, settings), policy.table_VC)
    compiled = {name: programs_of[name]() for name in ("decode_chunk", "insert")}
    table = LARGE.vocab_size * settings.mixing.k * 4
    taken = compiled["decode_chunk"].memory_analysis().argument_size_in_bytes - table
    assert sizes["rollout copy, float32"] + sizes["KV cache"] == pytest.approx(taken, rel=0.01)
    prefilled = compiled["insert"].memory_analysis().argument_size_in_bytes - sizes["KV cache"]
    # It takes hidden states of prompts and slots as well.
    assert sizes["keys and values of prefilled prompts"] == pytest.approx(prefilled, rel=0.02)


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.long)])
def test_an_updates_share_is_near_xlas_account_of_it(remat):
    deep = dataclasses.replace(LARGE, num_layers=4)
    settings, devices, _ = _split(deep, train__remat=remat)
    program = programs.update_programs(settings, deep, devices)["accumulate"]().memory_analysis()
    parts = memory.training_estimate(settings, deep)
    elsewhere = ("embedding before the update", "reference model, float32")
    estimated = sum(one.size for one in parts if one.phase == "update" and one.name not in elsewhere)
    # The sum of gradients is an argument and the output, in one place; the rest is temporary.
    assert 0.85 < estimated / (program.output_size_in_bytes + program.temp_size_in_bytes) < 1.3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"mesh__fsdp": 16}, "master parameters, float32"),
        ({"mesh__tensor": 2}, "rollout copy, bfloat16"),
        ({"rollout__slots": 32}, "KV cache"),
        ({"rollout__max_new_tokens": 2048, "eval__max_new_tokens": 2048}, "KV cache"),
        ({"data__max_prompt_tokens": 2048}, "keys and values of prefilled prompts"),
        ({"rollout__max_new_tokens": 2048}, "activations of a microbatch"),
        ({"mesh__tensor": 2}, "weights gathered from other devices"),
    ],
)
def test_every_remedy_makes_its_allocation_smaller(change, name):
    assert _sizes(**change)[name] <= _sizes()[name] / 1.9


def test_of_a_layers_scratch_and_a_chunks_logits_an_accelerator_holds_one_at_a_time():
    few, many = _sizes(train__logprob_chunk=2048), _sizes(train__logprob_chunk=4096)
    assert many["logits chunk"] == 2 * few["logits chunk"] > 2 * _sizes()["scratch of a layer"]
    assert "logits chunk" not in _sizes() and "scratch of a layer" not in few


def test_remat_trades_memory():
    full, dots, none = (
        _sizes(train__remat=remat)["activations of a microbatch"] for remat in ("full", "dots", "none")
    )
    assert full < dots < none
    assert "reference model, bfloat16" not in _sizes(objective__kl_coef=0.0)


def test_a_chunk_holds_no_more_tokens_than_a_microbatch():
    small = {"rollout__max_new_tokens": 128, "data__max_prompt_tokens": 128}
    assert _sizes(**small)["logits chunk"] == 3 * 4 * 256 * 151936
    assert _sizes(mesh__fsdp=1)["weights gathered from other devices"] == 0


def _scratch_of_the_table(platform, **changes):
    parts = memory.training_estimate(_settings(**changes), R1_1_5B, platform=platform)
    return next(one.size for one in parts if one.name == "scratch of the neighbour table")


def test_the_table_counts_while_it_is_made_and_its_rows_while_they_change():
    found = {one.name: one for one in _estimate()}
    rows = 4 * 151936 * 1536
    made, before = found["scratch of the neighbour table"], found["embedding before the update"]
    # Eighty tiles of 2048 rows, of which the last are filled up; and two copies that are not.
    assert (made.phase, made.size) == ("table", 2 * rows + 163840 * (4 * 1536 + 4096))
    assert _scratch_of_the_table("tpu") == made.size + rows
    assert _scratch_of_the_table("tpu", mesh__fsdp=4, mesh__tensor=2) == made.size
    assert (before.phase, before.size) == ("update", rows // 8)
    assert "scratch of the neighbour table" not in _sizes(mixing__rate=0.0)


def test_the_rollouts_copy_is_gone_when_the_update_begins():
    assert [one.phase for one in _estimate() if one.name.startswith("rollout copy")] == ["rollout"]


def test_what_waits_in_host_memory_counts_in_the_update_alone():
    def phases(offload):
        return {one.name: one.phase for one in _estimate(train__offload=offload)}

    adam, reference = "Adam moments, float32", "reference model, bfloat16"
    assert (phases("none")[adam], phases("none")[reference]) == ("always", "always")
    assert (phases("optimizer")[adam], phases("optimizer")[reference]) == ("update", "always")
    assert (phases("both")[adam], phases("both")[reference]) == ("update", "update")


def test_plain_attention_counts_the_scores_of_whole_rows():
    name = "scratch of a layer"
    assert _sizes(attention="plain")[name] > 2 * _sizes()[name]


def test_the_peak_is_that_of_the_worst_phase():
    parts = [
        Allocation("a", 5, "always", ""),
        Allocation("b", 7, "rollout", ""),
        Allocation("c", 3, "update", ""),
    ]
    assert memory.peak(parts) == (12, "rollout")
    assert memory.peak([*parts, Allocation("d", 5, "update", "")]) == (13, "update")
    assert memory.peak([*parts, Allocation("t", 9, "table", "")]) == (14, "table")


def test_too_much_is_one_sentence_with_the_part_and_its_remedy():
    parts = _estimate(rollout__slots=1024)
    needed, phase = memory.peak(parts)
    assert phase == "rollout"
    assert memory.memory_problem(parts, needed) is None
    assert memory.memory_problem(parts, None) is None
    sentence = memory.memory_problem(parts, 40 * GIB)
    assert sentence is not None
    assert all(word in sentence for word in ("40.0 GiB", "KV cache", "lower rollout.slots")), sentence


def test_device_memory_reads_the_accelerator_or_the_host(tmp_path):
    class Accelerator:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 7}

    assert capacity.device_memory(Accelerator()) == 7
    cpu = jax.devices()[0]
    whole = capacity.device_memory(cpu)
    assert whole is None or 0 < (capacity.device_memory(cpu, sharers=8) or 0) < whole
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    assert capacity.container_memory(str(tmp_path)) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity.container_memory(str(tmp_path)) is None


def test_a_workdir_may_be_there_or_not_and_is_left_alone(tmp_path):
    capacity.check_workdir(tmp_path)
    capacity.check_workdir(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_or_lies_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; name a directory"):
        capacity.check_workdir(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot be made, because .*file is a file"):
        capacity.check_workdir(tmp_path / "file" / "run")


def test_a_workdir_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match="cannot be written"):
        capacity.check_workdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be made"):
        capacity.check_workdir(tmp_path / "a")


def test_a_disk_without_room_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"free, and the checkpoints of this model need 1024 TiB"):
        capacity.check_workdir(tmp_path, needed_bytes=1024 * 1024**4)


def test_a_workdir_whose_folders_cannot_be_renamed_is_refused_and_left_as_it_was(tmp_path, monkeypatch):
    capacity.check_renames(tmp_path)

    def refuse(self, target):
        raise OSError(errno.EMFILE, "Too many open files")  # what gcsfuse says of a bucket without folders

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot be renamed \(Too many open files\).*hierarchical namespace"):
        capacity.check_renames(tmp_path)
    assert list(tmp_path.iterdir()) == []
