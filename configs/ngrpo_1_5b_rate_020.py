"""N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with ρ = 0.2.

    python -m ngrpo_jax.train --config=configs/ngrpo_1_5b_rate_020.py --workdir=runs/ngrpo_1_5b_rate_020

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 77.65 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.rate = 0.2
    return config
