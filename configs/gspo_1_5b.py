"""GSPO on DeepSeek-R1-Distill-Qwen-1.5B: one ratio a sequence (arXiv 2507.18071), no mixing.

    python -m ngrpo_jax.train --config=configs/gspo_1_5b.py --workdir=runs/gspo_1_5b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 77.34 % over AIME25, AMC23 and MATH500.
"""

from configs import ngspo_1_5b


def get_config():
    config = ngspo_1_5b.get_config()
    config.mixing.rate = 0.0
    return config
