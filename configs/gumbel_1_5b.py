"""Gumbel soft thinking on DeepSeek-R1-Distill-Qwen-1.5B (arXiv 2511.06411): k perturbed tokens a step.

    python -m ngrpo_jax.train --config=configs/gumbel_1_5b.py --workdir=runs/gumbel_1_5b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 76.89 % over AIME25, AMC23 and MATH500.
The paper does not say its k; 10 is ours.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.strategy = "gumbel"
    config.mixing.rate = 1.0
    config.mixing.k = 10
    return config
