"""Peaks of devices by their names, and the most memory that one has held."""

import dataclasses

import jax
import pytest

from ngrpo_jax.errors import UserError
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.flops import forward_flops
from ngrpo_jax.runtime import hardware


@dataclasses.dataclass
class Device:
    device_kind: str
    platform: str = "tpu"
    stats: dict | None = None

    def memory_stats(self):
        return self.stats


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40G", None),
        ("cpu", None),
    ],
)
def test_the_longest_name_that_fits_decides(kind, peak):
    assert hardware.peak_flops(Device(kind)) == peak


def test_peak_memory_is_the_devices_or_on_cpu_the_processs():
    assert hardware.peak_memory(Device("x", stats={"peak_bytes_in_use": 5})) == 5
    assert hardware.peak_memory(Device("x", stats=None)) is None
    held = hardware.peak_memory(jax.devices()[0])
    assert held is None or held > 1e7


def test_forward_flops_count_products_head_at_responses_and_causal_attention():
    model = ModelConfig("llama", 100, 16, 24, 3, 4, 2, 8)
    tokens = 5 + 7 - 1
    layer = 16 * 4 * 8 * 2 + 16 * 2 * 8 * 2 + 3 * 16 * 24
    norms = 3 * 2 * 16 + 16  # counted with the weights; nothing beside them
    attention = sum(2 * 2 * 4 * 8 * (t + 1) for t in range(tokens)) * 3
    expected = 2 * tokens * (3 * layer + norms) + attention + 2 * 16 * 100 * 7
    assert forward_flops(model, 5, 7) == expected


SAID = {
    "cuda": (AssertionError(), r"pip install -e '\.\[cuda12\]'"),
    "cuda,cpu": (None, r"pip install -e '\.\[cuda12\]'"),  # jax goes on with the CPU
    "tpu,cpu": (RuntimeError("No TPU device found"), r"\(No TPU device found\); pip install -e '\.\[tpu\]'"),
    "tpu": (
        RuntimeError("The TPU is already in use by process with pid 7"),
        "pid 7.*end the process that holds",
    ),
}


@pytest.mark.parametrize("platforms", SAID)
def test_an_accelerator_that_is_asked_for_and_not_there_is_one_sentence(monkeypatch, platforms):
    error, sentence = SAID[platforms]

    def devices():
        if error is not None:
            raise error
        return [Device("cpu", "cpu")]

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(type(jax.config), "jax_platforms", platforms)
    with pytest.raises(
        UserError, match=f"JAX_PLATFORMS asks for {platforms.partition(',')[0]}, .*{sentence}"
    ):
        hardware.visible()


@pytest.mark.parametrize(
    ("platforms", "platform"), [("cuda,cpu", "gpu"), ("tpu", "tpu"), ("cpu", "cpu"), ("", "cpu")]
)
def test_the_devices_of_the_platform_asked_for_are_the_runs(monkeypatch, platforms, platform):
    found = [Device("one", platform)]
    monkeypatch.setattr(jax, "devices", lambda: found)
    monkeypatch.setattr(type(jax.config), "jax_platforms", platforms)
    assert hardware.visible() is found
