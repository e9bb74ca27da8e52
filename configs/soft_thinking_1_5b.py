"""Soft Thinking (arXiv 2505.15778) on DeepSeek-R1-Distill-Qwen-1.5B, without training.

    python -m ngrpo_jax.evaluate --config=configs/soft_thinking_1_5b.py --workdir=runs/soft --step=start

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 77.18 % over AIME25, AMC23 and MATH500, and
44.56 % on AIME25. The paper does not give k for this baseline; 10 is the choice of this project.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.strategy = "soft"
    config.mixing.rate = 1.0
    config.mixing.k = 10
    config.eval.mixing = True
    return config
