"""N-GRPO on DeepSeek-R1-Distill-Qwen-7B: configs/ngrpo_1_5b.py with another model; nothing else differs.

    python -m ngrpo_jax.train --config=configs/ngrpo_7b.py --workdir=runs/ngrpo_7b

Data and time: docs/paper.md. Hardware: 8 × 80 GB GPUs or a TPU slice of that size.
Expect: the paper reports an average Pass@32 of 84.20 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    return config
