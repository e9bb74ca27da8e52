"""N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with the paper's settings (Table 6), 8 devices.

    python -m ngrpo_jax.train --config=configs/ngrpo_1_5b.py --workdir=runs/ngrpo_1_5b

Data: DeepScaleR-Preview (about 40k problems) and AIME 2024, downloaded on first use; docs/data.md says how to
use your own files.
Hardware: 8 × 80 GB GPUs or a TPU slice of that size; parameters are split over all of them.
Time: not measured yet; docs/paper.md has estimates.
Expect: the paper reports Mean@32 / Pass@32 of 23.33 / 50.28 % on AIME25 and an average Pass@32 of 79.17 %
over AIME25, AMC23 and MATH500, against 74.62 % before training and 77.41 % by GRPO.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.mesh.fsdp = 8
    return config
