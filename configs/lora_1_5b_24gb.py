"""configs/lora_1_5b_16gb.py for one GPU of 24 GB: more responses side by side, and longer prompts.

    python -m ngrpo_jax.train --config=configs/lora_1_5b_24gb.py --workdir=runs/lora_1_5b

Hardware: an L4, RTX 3090 or RTX 4090; 16.1 GiB by the estimate of memory.
Expect: nothing has been run at this size yet; docs/lora.md has small models.
"""

from configs import lora_1_5b_16gb


def get_config():
    config = lora_1_5b_16gb.get_config()
    config.data.max_prompt_tokens = 1024
    config.rollout.slots = 32
    return config
