"""GRPO on Llama-3.2-1B: configs/ngrpo_llama_1b.py without mixing; nothing else differs.

    python -m ngrpo_jax.train --config=configs/grpo_llama_1b.py --workdir=runs/grpo_llama_1b

Data, hardware and time: docs/paper.md.
Expect: the paper reports an average Pass@32 of 44.77 % over AIME25, AMC23 and MATH500.
"""

from configs import ngrpo_llama_1b


def get_config():
    config = ngrpo_llama_1b.get_config()
    config.mixing.rate = 0.0
    return config
