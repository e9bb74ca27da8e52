"""N-GRPO on Qwen3-1.7B-Base: configs/ngrpo_1_5b.py with another model; nothing else differs.

    python -m ngrpo_jax.train --config=configs/ngrpo_qwen3_1_7b.py --workdir=runs/ngrpo_qwen3_1_7b

Data and time: docs/paper.md. Hardware: 8 × 80 GB GPUs or a TPU slice of that size.
Expect: the paper reports an average Pass@32 of 63.46 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.model.path = "Qwen/Qwen3-1.7B-Base"
    return config
