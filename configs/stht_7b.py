"""Soft Tokens, Hard Truths on DeepSeek-R1-Distill-Qwen-7B: noise on every thinking token, σ = 0.33.

    python -m ngrpo_jax.train --config=configs/stht_7b.py --workdir=runs/stht_7b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 82.53 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_7b


def get_config():
    config = ngrpo_7b.get_config()
    config.mixing.strategy = "noise"
    config.mixing.rate = 1.0
    return config
