"""GRPO on DeepSeek-R1-Distill-Qwen-7B with the settings of the authors' release.

    python -m ngrpo_jax.train --config=configs/released/grpo_7b.py --workdir=runs/released/grpo_7b

Data, hardware, time, and what else the release does differently: docs/paper.md.
Expect: no number of the paper is known to come from these settings.
"""

from configs.released import ngrpo_7b


def get_config():
    config = ngrpo_7b.get_config()
    config.mixing.rate = 0.0
    return config
