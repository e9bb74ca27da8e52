"""N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B by low-rank adapters on one device of 16 GB (a TPU v5e chip).

    python -m ngrpo_jax.train --config=configs/lora_1_5b_16gb.py --workdir=runs/lora_1_5b

configs/ngrpo_1_5b.py with adapters of rank 32 on all matrices of the layers and ten times its learning rate
(docs/lora.md). 16 responses are decoded side by side; prompts longer than 256 tokens are left out.
Hardware: 11.1 of the 15.75 GiB of a TPU v5e chip, by compiling for it.
Expect: nothing has been run at this size yet; docs/lora.md has small models.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.lora.rank = 32
    config.optimizer.learning_rate = 1e-5
    config.data.max_prompt_tokens = 256
    config.rollout.slots = 16
    return config
