"""Soft Tokens, Hard Truths on DeepSeek-R1-Distill-Qwen-1.5B: noise on every thinking token, σ = 0.33.

    python -m ngrpo_jax.train --config=configs/stht_1_5b.py --workdir=runs/stht_1_5b

Data, hardware and time: docs/paper.md.
Expect: the paper reports Mean@32 / Pass@32 of 20.42 / 46.73 % on AIME25 and an average Pass@32 of 78.05 %.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.strategy = "noise"
    config.mixing.rate = 1.0
    return config
