"""GRPO on Qwen3-1.7B-Base: configs/ngrpo_qwen3_1_7b.py without mixing; nothing else differs.

    python -m ngrpo_jax.train --config=configs/grpo_qwen3_1_7b.py --workdir=runs/grpo_qwen3_1_7b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 63.01 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_qwen3_1_7b


def get_config():
    config = ngrpo_qwen3_1_7b.get_config()
    config.mixing.rate = 0.0
    return config
