"""N-GRPO without a download: a small model made by the run learns to add and subtract. `make run` runs it.

    python -m ngrpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

A Qwen2 decoder of 1.2 million parameters with a character tokenizer is trained for a minute or two on worked
solutions (`<think>` steps `</think>\\boxed{answer}`). A confidence penalty keeps its samples varied, so that
about two answers in five are right. N-GRPO then trains it by the reward alone.
Hardware: two CPU cores. Time: four to five minutes.
Expect: held-out Mean@8 rises from about 0.4 to about 0.8.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.path = "warm-start"
    config.model.dtype = "float32"
    config.warm_start.num_layers = 4
    config.warm_start.hidden_size = 128
    config.warm_start.intermediate_size = 640
    config.warm_start.num_heads = 4
    config.warm_start.num_kv_heads = 2
    config.warm_start.steps = 300
    config.warm_start.batch = 64
    config.warm_start.confidence_penalty = 0.14
    config.data.train = config.data.eval = "arithmetic:terms=3,digits=1,ops=+-"
    config.data.prompt = "plain"
    config.data.max_prompt_tokens = 32
    config.rollout.prompts = 32
    config.rollout.group = 8
    config.rollout.max_new_tokens = 32
    config.rollout.temperature = 1.0
    config.rollout.slots = 256
    config.rollout.chunk = 4
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5
    config.train.steps = 36
    config.train.mini_batch_prompts = 16
    config.train.row_tokens = 128
    config.train.rows_per_device = 32
    config.train.logprob_chunk = 4096
    config.train.remat = "none"
    config.train.share_prompts = True
    config.train.unroll = True
    config.checkpoint.every = 9
    config.eval.every = 18
    config.eval.problems = 100
    config.eval.samples = 8
    config.eval.pass_k = (8,)
    config.eval.temperature = 1.0
    config.eval.top_p = 1.0
    config.eval.max_new_tokens = 32
    config.reward.workers = 2
    return config
