"""N-GRPO on a pretrained model that fits a laptop: SmolLM2-135M-Instruct learns one-digit additions.

    python -m ngrpo_jax.train --config=configs/smollm2.py --workdir=runs/smollm2

By default the model comes from the Hugging Face hub; --config.model.path=DIR takes a directory.
Answers are graded by their last number, since this model does not write \\boxed{}. It writes no `</think>`
either, so that inputs are mixed up to the end of a response.
Hardware: two CPU cores and 8 GB of memory. Time: about a quarter of an hour.
Expect: docs/smollm2.md has the curve of such a run.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.dtype = "float32"
    config.data.train = config.data.eval = "arithmetic:terms=2,digits=1,ops=+"
    config.data.train_size = 92
    config.data.prompt = "plain"
    config.data.chat_template = "configs/smollm2.jinja"
    config.data.max_prompt_tokens = 40
    config.mixing.until = None
    config.rollout.prompts = 3
    config.rollout.group = 8
    config.rollout.max_new_tokens = 24
    config.rollout.temperature = 0.7
    config.rollout.slots = 24
    config.rollout.chunk = 8
    config.optimizer.learning_rate = 2e-5
    config.train.steps = 20
    config.train.mini_batch_prompts = 3
    config.train.rows_per_device = 4
    config.train.row_tokens = 128
    config.train.remat = "none"
    config.train.share_prompts = True
    config.checkpoint.every = 10
    config.eval.every = None
    config.eval.problems = 8
    config.eval.samples = 8
    config.eval.pass_k = (8,)
    config.eval.temperature = 0.7
    config.eval.top_p = 1.0
    config.eval.max_new_tokens = 24
    config.reward.kind = "ngrpo_jax.tasks.rewards:last_number_reward"
    config.reward.workers = 1
    return config
