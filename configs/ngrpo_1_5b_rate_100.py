"""N-GRPO without rate on DeepSeek-R1-Distill-Qwen-1.5B: every thinking step is mixed (ρ = 1).

    python -m ngrpo_jax.train --config=configs/ngrpo_1_5b_rate_100.py --workdir=runs/ngrpo_1_5b_rate_100

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 77.32 % over AIME25, AMC23 and MATH500.
All responses to a prompt follow the same most likely tokens until `</think>`, so that many groups have no
variance: groups/zero_variance in metrics.jsonl is their share.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.mixing.rate = 1.0
    return config
