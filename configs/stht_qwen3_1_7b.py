"""Soft Tokens, Hard Truths on Qwen3-1.7B-Base: noise on every thinking token, σ = 0.33.

    python -m ngrpo_jax.train --config=configs/stht_qwen3_1_7b.py --workdir=runs/stht_qwen3_1_7b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 61.94 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_qwen3_1_7b


def get_config():
    config = ngrpo_qwen3_1_7b.get_config()
    config.mixing.strategy = "noise"
    config.mixing.rate = 1.0
    return config
