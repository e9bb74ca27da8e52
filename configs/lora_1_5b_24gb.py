"""configs/lora_1_5b_16gb.py for one GPU of 24 GB, such as an L4 or an RTX 4090: more responses side by side.

python -m ngrpo_jax.train --config=configs/lora_1_5b_24gb.py --workdir=runs/lora_1_5b
"""

from configs import lora_1_5b_16gb


def get_config():
    config = lora_1_5b_16gb.get_config()
    config.data.max_prompt_tokens = 1024
    config.rollout.slots = 32
    return config
