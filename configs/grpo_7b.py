"""GRPO on DeepSeek-R1-Distill-Qwen-7B: configs/ngrpo_7b.py without mixing; nothing else differs.

    python -m ngrpo_jax.train --config=configs/grpo_7b.py --workdir=runs/grpo_7b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 81.94 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_7b


def get_config():
    config = ngrpo_7b.get_config()
    config.mixing.rate = 0.0
    return config
