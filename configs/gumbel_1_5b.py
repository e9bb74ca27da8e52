"""Gumbel soft thinking on DeepSeek-R1-Distill-Qwen-1.5B (arXiv 2511.06411): mixtures of k perturbed tokens.

    python -m ngrpo_jax.train --config=configs/gumbel_1_5b.py --workdir=runs/gumbel_1_5b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 76.89 % over AIME25, AMC23 and MATH500.
The paper does not give k for this baseline; 10 is the choice of this project.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.strategy = "gumbel"
    config.mixing.rate = 1.0
    config.mixing.k = 10
    return config
