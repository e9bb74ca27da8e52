"""N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with neighbours by L2 distance.

    python -m ngrpo_jax.train --config=configs/ngrpo_1_5b_l2.py --workdir=runs/ngrpo_1_5b_l2

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 77.68 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.metric = "l2"
    return config
