"""Prints the decode program of a small model, compiled for a target, which takes a process of its own.

python tests/target_decode.py TARGET
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import targets
from ngrpo_jax.rollout.request import RolloutRequest, SamplingParams
from ngrpo_jax.rollout.shapes import largest_programs
from ngrpo_jax.runtime import mesh

CONFIG = ModelConfig("qwen2", 517, 512, 1024, 2, 4, 2, 128, dtype="bfloat16")


def main() -> None:
    devices = targets.devices(sys.argv[1])
    grid = mesh.make_mesh(1, len(devices), 1, devices)
    shapes = jax.eval_shape(
        lambda params: inference.to_inference_layout(params, CONFIG), decoder.parameter_shapes(CONFIG)
    )
    params = mesh.shapes_on(shapes, mesh.param_shardings(grid, shapes, layout="tensor"))
    request = RolloutRequest(
        CONFIG,
        SamplingParams(0.7),
        samples=2,
        max_new_tokens=896,
        slots=16,
        chunk=2,
        max_prompt_tokens=128,
        sharding=mesh.slots_sharding(grid, "tensor"),
        attention="ring",
    )
    print(largest_programs(params, request)["decode_chunk"]().as_text())


if __name__ == "__main__":
    main()
