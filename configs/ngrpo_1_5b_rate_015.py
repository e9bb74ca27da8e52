"""N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with ρ = 0.15.

    python -m ngrpo_jax.train --config=configs/ngrpo_1_5b_rate_015.py --workdir=runs/ngrpo_1_5b_rate_015

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 78.12 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.rate = 0.15
    return config
