"""`rollout.slots` None: as many as fit, and the same number whenever a run starts (preflight/slots.py)."""

import dataclasses

import jax
import pytest

from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import fit, memory, slots
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import DataSettings, MeshSettings, RolloutSettings, Settings

GIB = 2**30
LONGEST = 256
R1_1_5B = ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, dtype="bfloat16")


def _settings(**changes):
    """Settings of 64 × 4 responses of up to 8192 tokens; `mesh__` and `rollout__` before a name change it."""
    rollout = {"prompts": 64, "group": 4, "max_new_tokens": 8192}
    grid = {"fsdp": 1}
    for name, value in changes.items():
        room, _, key = name.partition("__")
        {"mesh": grid, "rollout": rollout}[room][key] = value
    data = DataSettings(max_prompt_tokens=4096)
    return Settings(data=data, rollout=RolloutSettings(**rollout), mesh=MeshSettings(**grid))


def _devices():
    return meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def _decided(room, **changes):
    return slots.for_training(_settings(**changes), R1_1_5B, _devices(), LONGEST, room)


def _needed(settings, count):
    data = dataclasses.replace(settings.data, max_prompt_tokens=LONGEST)
    measured = dataclasses.replace(settings, data=data).with_slots(count)
    return memory.peak(fit.training_memory(measured, R1_1_5B, _devices()))[0]


@pytest.mark.parametrize("gib", [60, 70, 79.1])
def test_as_many_slots_as_fit_and_not_one_part_more(gib):
    room = int(gib * GIB)
    settings = _decided(room)
    count = settings.rollout.slots
    assert 0 < count < 256 and count % slots.GRAIN == 0
    assert fit.ESTIMATE_ERROR * _needed(settings, count) <= room
    assert fit.ESTIMATE_ERROR * _needed(settings, count + slots.GRAIN) > room


def test_no_more_slots_than_sequences():
    assert _decided(1000 * GIB).rollout.slots == 256
    assert _decided(1000 * GIB, rollout__prompts=16, rollout__group=3, mesh__fsdp=32).rollout.slots == 64


def test_no_memory_at_all_leaves_the_least_that_the_check_of_memory_then_refuses():
    assert _decided(1).rollout.slots == slots.GRAIN


def test_slots_are_whole_parts_of_what_they_are_split_into():
    room = 30 * GIB
    for layout, parts in (("tensor", 4), ("replicated", 8)):
        count = _decided(room, mesh__fsdp=4, mesh__tensor=2, rollout__layout=layout).rollout.slots
        assert count % (slots.GRAIN * parts) == 0


def test_a_given_number_is_kept_whatever_there_is():
    assert _decided(1, rollout__slots=37).rollout.slots == 37


def test_without_memory_of_its_own_a_device_has_the_measured_number_and_no_more_than_sequences():
    assert _decided(None).rollout.slots == slots.UNBOUNDED
    assert _decided(None, rollout__prompts=16, rollout__group=2).rollout.slots == 32


def test_the_longest_prompt_that_there_is_counts_and_not_the_limit():
    room = 70 * GIB
    limit = slots.for_training(_settings(), R1_1_5B, _devices(), 4096, room)
    assert limit.rollout.slots < _decided(room).rollout.slots


def test_an_evaluation_has_more_slots_than_a_training_and_no_more_than_its_sequences():
    room, settings = 60 * GIB, _settings()
    evaluation = slots.for_evaluation(settings, R1_1_5B, 10_000, LONGEST, room)
    assert evaluation.rollout.slots > _decided(room).rollout.slots
    assert slots.for_evaluation(settings, R1_1_5B, 30, LONGEST, room).rollout.slots == 30
