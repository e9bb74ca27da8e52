"""N-GRPO on Llama-3.2-1B: configs/ngrpo_1_5b.py with another model; nothing else differs.

    python -m ngrpo_jax.train --config=configs/ngrpo_llama_1b.py --workdir=runs/ngrpo_llama_1b

Data and time: docs/paper.md. Hardware: 8 × 80 GB GPUs or a TPU slice of that size.
Expect: the paper reports an average Pass@32 of 46.34 % over AIME25, AMC23 and MATH500.
The paper names Llama-3.2-1B; its 41.61 % before training suggest the instruct model, which has a template.
For the base model: --config.model.path=meta-llama/Llama-3.2-1B --config.data.chat_template=plain.
"""

from configs import ngrpo_1_5b


def get_config():
    config = ngrpo_1_5b.get_config()
    config.model.path = "meta-llama/Llama-3.2-1B-Instruct"
    return config
