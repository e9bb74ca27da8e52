"""N-GSPO on DeepSeek-R1-Distill-Qwen-1.5B: configs/ngrpo_1_5b.py with the objective of GSPO.

    python -m ngrpo_jax.train --config=configs/ngspo_1_5b.py --workdir=runs/ngspo_1_5b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 79.04 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.objective.algorithm = "gspo"
    config.objective.clip_low = 3e-4
    config.objective.clip_high = 4e-4
    return config
