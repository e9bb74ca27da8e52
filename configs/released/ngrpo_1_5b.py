"""N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with the settings and switches of the authors' release.

    python -m ngrpo_jax.train --config=configs/released/ngrpo_1_5b.py --workdir=runs/released/ngrpo_1_5b

Data, hardware, time, and what else the release does differently: docs/paper.md.
Expect: no number of the paper is known to come from these settings.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.k = 2
    config.mixing.table = "head"
    config.mixing.weights = "probs"
    config.mixing.token = "sampled"
    config.rollout.temperature = 1.0
    config.objective.kl_coef = 0.01
    config.objective.aggregate = "token"
    config.optimizer.learning_rate = 5e-7
    config.checkpoint.every = 10
    config.eval.every = 1
    return config
