"""Every setting, once, with the paper's value: N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B (arXiv 2606.10768).

The other files of this folder start from this one and change what they are about. Any leaf can be set on
the command line: `--config.rollout.temperature=1.0`. None means "not set".
"""

import ml_collections
from ml_collections.config_dict import FieldReference, placeholder


def _optional(value):
    """A leaf that has a value here and may be None elsewhere."""
    return FieldReference(value)


def _section(**leaves):
    return ml_collections.ConfigDict(leaves)


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # of data order, rollouts and, with model.path "warm-start", of the model

    config.model = _section(
        path="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",  # directory, hub name, or "warm-start"
        revision=placeholder(str),  # branch, tag or commit of a hub name; None: its default branch
        dtype="bfloat16",  # of matrix products; master parameters are float32 always
    )
    config.warm_start = _section(  # read only with model.path "warm-start"
        num_layers=4,
        hidden_size=192,
        intermediate_size=512,
        num_heads=6,
        num_kv_heads=2,
        steps=600,  # optimiser steps of supervised training
        batch=64,  # worked solutions a step
        learning_rate=3e-3,  # peak; warmed up, then cosine
        confidence_penalty=0.0,  # weight of an entropy bonus: above 0 leaves the model less sure
    )
    config.data = _section(
        train="jsonl:data/deepscaler.jsonl",  # arithmetic:, jsonl:, parquet:, tfds:, package.module:function
        eval="jsonl:data/aime24.jsonl",  # held-out problems, the same kinds of source
        train_size=placeholder(int),  # take this many problems of the source; None: all
        prompt="math",  # "math", "choice" or "plain": the sentence that follows the problem
        chat_template=placeholder(str),  # None: the tokenizer's own; a Jinja file; or "plain"
        max_prompt_tokens=4096,  # longer prompts are left out and counted
    )
    config.rollout = _section(
        prompts=64,  # problems a step
        group=4,  # responses a problem (G)
        max_new_tokens=8192,
        temperature=0.7,  # tau: divides the logits in rollout and learner alike
        top_p=1.0,  # training needs the untruncated law
        top_k=0,  # training needs the untruncated law
        slots=64,  # sequences decoded side by side
        chunk=32,  # decode steps between two looks at which sequences have ended
    )
    config.mixing = _section(
        strategy="neighbor",  # or "none"
        rate=0.1,  # rho: the share of thinking steps whose input is mixed; 0 is plain GRPO
        k=3,  # candidates, with the anchor
        metric="cosine",  # nearness of embedding rows: cosine, l2, l1, dot
        until=_optional("</think>"),  # mixing ends for good when the response has written this; None: never
        refresh_every=1,  # rollouts between two builds of the neighbour table
    )
    config.objective = _section(
        algorithm="grpo",  # or "gspo"
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=_optional(
            3.0
        ),  # bound on the loss of a bad response whose probability has grown; None: off
        kl_coef=0.001,  # beta, of the k3 estimator in the loss; 0: no reference model is loaded
        scale_by_std=True,  # divide advantages by the group's standard deviation
        aggregate="sequence",  # mean over each response, then over responses; or "token", "constant"
        loss_on_mixed=True,  # false: positions written at mixed steps have weight 0
    )
    config.optimizer = _section(
        learning_rate=1e-6,
        warmup_steps=0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,  # of the global gradient
    )
    config.train = _section(
        steps=625,  # rollout batches: one epoch of 40k problems by 64
        mini_batch_prompts=16,  # prompts an optimiser step
        row_tokens=placeholder(int),  # tokens of a packed row; None: the longest prompt + response
        rows_per_device=1,  # packed rows computed at once on each data shard
        remat="full",  # what the backward pass recomputes: none, dots, full
        logprob_chunk=1024,  # tokens whose logits exist at once, on each data shard
        profile_from=placeholder(int),  # first step that is traced into WORKDIR/profile; None: no trace
        profile_steps=1,  # steps that are traced
    )
    config.mesh = _section(data=1, fsdp=1, tensor=1)  # must multiply to the number of devices
    config.checkpoint = _section(every=20)  # steps between two checkpoints; the last step has one always
    config.eval = _section(
        every=_optional(20),  # steps between two evaluations; None: only before and after
        problems=placeholder(int),  # the first so many held-out problems; None: all
        samples=32,  # responses a problem (n of Mean@n)
        temperature=0.6,
        top_p=0.95,
        top_k=0,
        max_new_tokens=8192,
        pass_k=32,  # k of Pass@k
        mixing=False,  # true: evaluation mixes as the rollouts do
    )
    config.reward = _section(
        kind="math",  # "math", "choice" or package.module:function
        workers=8,  # grading processes
        deadline_s=5.0,  # for one answer; a slower one is wrong
        memory_mb=2048,  # of one grading process
    )
    config.lock()
    return config
