"""configs/lora_7b_80gb.py for a TPU v5e-8, whose chips share the base and the rollout's copy.

    python -m ngrpo_jax.train --config=configs/lora_7b_v5e_8.py --workdir=runs/lora_7b

Hardware: 9.9 of the 15.75 GiB of each of eight TPU v5e chips, by compiling for them.
Expect: nothing has been run at this size yet; docs/lora.md has small models.
"""

from configs import lora_7b_80gb


def get_config():
    config = lora_7b_80gb.get_config()
    config.mesh.fsdp = 2
    config.mesh.tensor = 4
    return config
