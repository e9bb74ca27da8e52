"""N-GRPO on DeepSeek-R1-Distill-Qwen-7B by low-rank adapters on one GPU of 80 GB.

    python -m ngrpo_jax.train --config=configs/lora_7b_80gb.py --workdir=runs/lora_7b

configs/ngrpo_7b.py with adapters of rank 32 on all matrices of the layers and ten times its learning rate
(docs/lora.md). Training all weights of this model takes more than 100 GB.
Hardware: 63.8 of the 79.1 GiB of an H100, by compiling for it.
Expect: nothing has been run at this size yet; docs/lora.md has small models.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.lora.rank = 32
    config.optimizer.learning_rate = 1e-5
    config.data.max_prompt_tokens = 1024
    config.rollout.slots = 64
    return config
