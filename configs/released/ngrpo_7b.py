"""N-GRPO on DeepSeek-R1-Distill-Qwen-7B with the settings and switches of the authors' release.

    python -m ngrpo_jax.train --config=configs/released/ngrpo_7b.py --workdir=runs/released/ngrpo_7b

Data, hardware, time, and what else the release does differently: docs/paper.md.
Expect: no number of the paper is known to come from these settings.
"""

from configs.released import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.mixing.rate = 0.15
    config.mixing.k = 3
    config.objective.kl_coef = 0.001
    config.optimizer.learning_rate = 1e-6
    return config
