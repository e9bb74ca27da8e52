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
        train="tfds:deepscaler",  # tfds:, jsonl:, json:, csv:, parquet:, arithmetic:, package.module:function
        eval="tfds:aime24",  # held-out problems, the same kinds of source
        train_size=placeholder(int),  # take this many problems of the source; None: all
        prompt="math",  # "math", "choice" or "plain": the sentence that follows the problem
        chat_template=placeholder(str),  # None: the tokenizer's own; a Jinja file; or "plain"
        max_prompt_tokens=4096,  # longer prompts are left out and counted
        overlap_with=placeholder(str),  # sources, joined by ";", that like `eval` are not to be trained on
        drop_overlap=False,  # true: problems to train on that stand in one of those are left out
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
        layout="tensor",  # parameters split over mesh.tensor, or "replicated": a whole copy on each device
    )
    config.mixing = _section(
        strategy="neighbor",  # soft, gumbel, noise (algo/strategies.py); none
        rate=0.1,  # rho: the share of thinking steps whose input is mixed; 0 is plain GRPO
        k=3,  # candidates, with the anchor; noise has none but the token
        metric="cosine",  # nearness of embedding rows: cosine, l2, l1, dot
        until=_optional("</think>"),  # mixing ends for good when the response has written this; None: never
        refresh_every=1,  # rollouts between two refreshes of the neighbour table
        table="embedding",  # neighbours by rows of the input embedding, or of the output "head"
        weights="logits",  # of neighbours: softmax of their logits (9), or of their "probs"
        token="anchor",  # written at a step mixed from neighbours; or the "sampled" one
        sigma=0.33,  # of strategy noise, in multiples of the rms of the token's embedding
        keep_out=placeholder(str),  # a regular expression: tokens with it in their text stay out of mixing
        distinct_spelling=False,  # true: neighbours differ by more than case or a leading space
    )
    config.objective = _section(
        algorithm="grpo",  # or "gspo"
        clip_low=0.2,
        clip_high=0.2,
        # Bound on the loss of a bad response whose probability has grown; None: off.
        dual_clip=_optional(3.0),
        kl_coef=0.001,  # beta, of the KL term in the loss; 0: no reference model is loaded
        kl_estimator="k3",  # or k1, k2
        scale_by_std=True,  # divide advantages by the group's standard deviation
        aggregate="sequence",  # mean over each response, then over responses; or "token", "constant"
        loss_on_mixed=True,  # false: positions written at mixed steps have weight 0
        skip_zero_variance=False,  # true: groups of equal rewards are left out of the update, KL included
        overlong="keep",  # responses cut off at the limit: "mask" leaves them out, "penalize" lowers rewards
        overlong_penalty=1.0,  # what "penalize" takes off the reward of a response at its limit
        overlong_interval=0,  # tokens before the limit over which that grows from 0; 0: cut-off ones alone
        old_logprobs="trainer",  # of the ratio: computed anew, or recorded by the "sampler" (one pass fewer)
        importance_cap=placeholder(float),  # weights of at most this for trainer against sampler; None: off
        entropy_coef=0.0,  # of an entropy bonus in the loss
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
        attention="auto",  # plain, chunked (anywhere), cudnn (NVIDIA), splash (TPU); auto: what fits best
        unroll=False,  # true: layers written out, not scanned: a little faster, longer to compile
        share_prompts=False,  # true: a row has the prompt of a group once; pays where prompts are long
        offload="none",  # to host memory between uses: "optimizer" (its state), "reference", "both"
        profile_from=placeholder(int),  # first step that is traced into WORKDIR/profile; None: no trace
        profile_steps=1,  # steps that are traced
    )
    config.mesh = _section(data=1, fsdp=1, tensor=1)  # must multiply to the number of devices
    config.checkpoint = _section(
        every=20,  # steps between two checkpoints; the last step has one always
        best_metric="mean_at_n",  # held-out figure of the best one: mean_at_n, pass_at_k or maj_at_n
    )
    config.eval = _section(
        every=_optional(20),  # steps between two evaluations; None: only before and after
        problems=placeholder(int),  # the first so many held-out problems; None: all
        samples=32,  # responses a problem (n of Mean@n)
        temperature=0.6,
        top_p=0.95,
        top_k=0,
        max_new_tokens=8192,
        pass_k=(16, 32),  # each k of Pass@k; training reports the largest
        mixing=False,  # true: evaluation mixes as the rollouts do
        sets=(),  # what `evaluate` evaluates, each a source and options (docs/evaluation.md); (): data.eval
    )
    config.reward = _section(
        kind="math",  # "math", "choice" or package.module:function
        workers=8,  # grading processes
        deadline_s=5.0,  # for one answer; a slower one is wrong
        memory_mb=2048,  # of one grading process
    )
    config.lock()
    return config
