"""GRPO on DeepSeek-R1-Distill-Qwen-1.5B: configs/ngrpo_1_5b.py without mixing; nothing else differs.

    python -m ngrpo_jax.train --config=configs/grpo_1_5b.py --workdir=runs/grpo_1_5b

Data, hardware and time: docs/paper.md.
Expect: the paper reports Mean@32 / Pass@32 of 21.35 / 47.31 % on AIME25 and an average Pass@32 of 77.41 %.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.rate = 0.0
    return config
