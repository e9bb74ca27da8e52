"""Soft Tokens, Hard Truths on Llama-3.2-1B: noise on every thinking token, σ = 0.33.

    python -m ngrpo_jax.train --config=configs/stht_llama_1b.py --workdir=runs/stht_llama_1b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 44.17 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_llama_1b


def get_config():
    config = ngrpo_llama_1b.get_config()
    config.mixing.strategy = "noise"
    config.mixing.rate = 1.0
    return config
