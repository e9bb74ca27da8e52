"""GRPO on DeepSeek-R1-Distill-Qwen-1.5B with the settings of the authors' release.

    python -m ngrpo_jax.train --config=configs/released/grpo_1_5b.py --workdir=runs/released/grpo_1_5b

Data, hardware, time, and what else the release does differently: docs/paper.md.
Expect: no number of the paper is known to come from these settings. Learning rate and β differ
from those of released/ngrpo_1_5b.py, so that these two runs do not isolate the effect of mixing;
configs/grpo_1_5b.py and configs/ngrpo_1_5b.py do.
"""

from configs.released import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.rate = 0.0
    config.objective.kl_coef = 0.001
    config.optimizer.learning_rate = 1e-6
    return config
