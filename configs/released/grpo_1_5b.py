"""GRPO on DeepSeek-R1-Distill-Qwen-1.5B with the settings of the authors' release.

    python -m ngrpo_jax.train --config=configs/released/grpo_1_5b.py --workdir=runs/released/grpo_1_5b

Data, hardware and time, and what the release does besides: docs/paper.md.
Expect: no figure of the paper is known to come from these settings. They differ from those of N-GRPO by more
than the mixing (learning rate and β), so that the two compare nothing; configs/grpo_1_5b.py does.
"""

from configs.released import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.rate = 0.0
    config.objective.kl_coef = 0.001
    config.optimizer.learning_rate = 1e-6
    return config
