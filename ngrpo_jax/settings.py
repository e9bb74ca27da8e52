"""Every setting, once: its name, type, default and meaning; and the rules between settings.

The defaults are those of the paper (N-GRPO on DeepSeek-R1-Distill-Qwen-1.5B, arXiv 2606.10768). The type of a
setting says which values it may have (schema.py). `configs/base.py` is these defaults as a ConfigDict, the
other files of configs/ change some of them, `resolve` makes frozen dataclasses of the result, once. No other
code uses a ConfigDict. ml_collections is imported only in the functions that need it, so that rollout and
learner run without it.
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Self

from ngrpo_jax import choices
from ngrpo_jax.algo.mixture import STRATEGIES, TABLES, TOKENS, WEIGHTS, Mixing
from ngrpo_jax.algo.neighbors import METRICS
from ngrpo_jax.algo.objectives import ALGORITHMS, KL_ESTIMATORS
from ngrpo_jax.errors import require
from ngrpo_jax.former_settings import former
from ngrpo_jax.runtime.loggers import LOGGERS
from ngrpo_jax.schema import (
    INT64,
    MAY_CHANGE,
    Check,
    Count,
    Decay,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Section,
    at_least,
    at_most,
    each_of,
    flatten,
    is_pattern,
    one_of,
)

# Mixing settings that must have their defaults with a strategy that does not read them. `k`, `metric` and
# `sigma` need not: runs of earlier versions may have set them.
REFUSED_IF_UNREAD = ("table", "weights", "token", "distinct_spelling")
MOST_RESPONSES = 2**20  # of a step; hosts hold them as text


@dataclasses.dataclass(frozen=True)
class ModelSettings(Section, prefix="model."):
    """Which checkpoint, and the dtype of its matrix products."""

    # Directory, hub name, or "warm-start".
    path: Annotated[str, MAY_CHANGE] = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    # Branch, tag or commit of a hub name; None: its default branch.
    revision: Annotated[str | None, MAY_CHANGE] = None
    # Directory or hub name of an adapter (PEFT) to start from: trained on with lora.rank, else merged.
    adapter: Annotated[str | None, MAY_CHANGE] = None
    # Of matrix products, and of the base under adapters. What is trained is always float32.
    dtype: Annotated[str, one_of(choices.DTYPES)] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class LoraSettings(Section, prefix="lora."):
    """Low-rank adapters (arXiv 2106.09685), trained in the place of the model's own weights."""

    rank: Count | None = None  # width of the two factors of an adapter; None: all weights are trained
    alpha: Positive = 32.0  # the adapters' product is scaled by alpha / rank
    # Matrices with adapters: "all" of the layers, "attention", "mlp", or a regular expression over paths.
    targets: Annotated[str, Check(is_pattern, "a regular expression")] = "all"
    # "rslora": alpha / sqrt(rank) in its place (arXiv 2312.03732), which suits high ranks.
    scaling: Annotated[str, one_of(choices.LORA_SCALINGS)] = "standard"
    # Of the first factor: "uniform" in ±1/sqrt(inputs), or "gaussian" with deviation 1/rank; the second is 0.
    init: Annotated[str, one_of(choices.LORA_INITS)] = "uniform"

    def rules(self) -> Iterator[tuple[bool, str]]:
        for name in ("alpha", "targets", "scaling", "init"):
            value, default = getattr(self, name), getattr(type(self), name)
            yield (
                self.rank is not None or value == default,
                f"lora.{name} is {value!r} without lora.rank, so that there are no adapters; set lora.rank, "
                f"or leave it at {default!r}.",
            )

    @property
    def scale(self) -> float:
        """The factor of the adapters' product; not to be asked without a rank."""
        assert self.rank is not None
        return self.alpha / (self.rank if self.scaling == "standard" else self.rank**0.5)


@dataclasses.dataclass(frozen=True)
class WarmStartSettings(Section, prefix="warm_start.", may_change=True):
    """The small model that `model.path = "warm-start"` makes, and its supervised training."""

    num_layers: Count = 4
    hidden_size: Count = 192
    intermediate_size: Count = 512
    num_heads: Count = 6
    num_kv_heads: Count = 2
    steps: Count = 600  # optimiser steps of supervised training
    batch: Count = 64  # worked solutions a step
    learning_rate: Positive = 3e-3  # the peak, after a linear warm-up and before a cosine decay
    confidence_penalty: Decay = 0.0  # weight of an entropy bonus: above 0 leaves the model less certain

    def rules(self) -> Iterator[tuple[bool, str]]:
        for size, divisor in (("hidden_size", "num_heads"), ("num_heads", "num_kv_heads")):
            whole, part = getattr(self, size), getattr(self, divisor)
            sentence = f"warm_start.{size} {whole} is no multiple of warm_start.{divisor} {part}."
            yield whole % part == 0, sentence


@dataclasses.dataclass(frozen=True)
class DataSettings(Section, prefix="data."):
    """Where problems come from and how they become prompts."""

    # Sources: tfds:, jsonl:, json:, csv:, parquet:, arithmetic:, package.module:function.
    train: str = "tfds:deepscaler"
    eval: str = "tfds:aime24"  # held-out problems
    train_size: Count | None = None  # take this many problems of the source; None: all
    # The sentence that follows a problem.
    prompt: Annotated[str, one_of(choices.PROMPTS)] = "math"
    chat_template: str | None = None  # None: the tokenizer's own; a Jinja file; or "plain"
    # Tokens, or their ids, that end a response besides those of the model's files.
    stop: tuple[str, ...] = ()
    system_prompt: str | None = None  # a system turn before each problem; None: none
    # NAME=VALUE each, for the chat template, such as "enable_thinking=false".
    template_options: Annotated[
        tuple[str, ...], Check(lambda options: all("=" in one for one in options), "each NAME=VALUE")
    ] = ()
    max_prompt_tokens: Count = 4096  # longer prompts are left out and counted
    overlap_with: str | None = None  # further sources, joined by ";", whose problems are not to be trained on
    drop_overlap: bool = False  # true: leaves problems out of training that `eval` or `overlap_with` contain

    @property
    def held_apart(self) -> tuple[str, ...]:
        """The sources whose problems should not be trained on."""
        more = (source.strip() for source in (self.overlap_with or "").split(";"))
        return tuple(dict.fromkeys([self.eval, *filter(None, more)]))


@dataclasses.dataclass(frozen=True)
class RolloutSettings(Section, prefix="rollout."):
    """How responses are sampled in training: from the whole distribution, without top-p or top-k."""

    prompts: Count = 64  # problems a step
    # Responses a problem (G).
    group: Annotated[int, Check(lambda n: n >= 2, "2 or above: advantages compare a group's responses")] = 4
    max_new_tokens: Count = 8192
    temperature: Positive = 0.7  # tau: divides the logits in rollout and learner alike
    # Sequences decoded side by side; None: as many as fit in an accelerator's memory, 64 on a CPU.
    slots: Annotated[Count | None, MAY_CHANGE] = None
    # Decode steps between two checks of which sequences have ended.
    chunk: Annotated[Count, MAY_CHANGE, at_most(1024)] = 32
    # Parameters split over mesh.tensor, or "replicated": a whole copy on each device.
    layout: Annotated[str, one_of(choices.LAYOUTS), MAY_CHANGE] = "tensor"
    # "int8": the layers' matrices rounded in training's rollouts, which read half the bytes of bfloat16 then.
    quantize: Annotated[str, one_of(choices.QUANTIZATIONS)] | None = None
    # Of a decode step: a kernel for TPU and GPU reads what rows of the "ring" cache hold, "plain" whole rows.
    # "auto": the kernel on TPU alone; on a GPU it has not been timed yet.
    attention: Annotated[str, one_of(choices.DECODE_ATTENTION), MAY_CHANGE] = "auto"

    @property
    def slot_count(self) -> int:
        """`slots`, given or decided (preflight/slots.py)."""
        if self.slots is None:
            raise ValueError("rollout.slots is not decided yet")
        return self.slots


@dataclasses.dataclass(frozen=True)
class MixingSettings(Section, prefix="mixing."):
    """Semantic Neighbor Mixing in rollouts (docs/method.md)."""

    strategy: Annotated[str, one_of(STRATEGIES)] = "neighbor"
    rate: Probability = 0.1  # rho: the share of thinking steps whose input is mixed; 0 is plain GRPO
    k: Count = 3  # candidates, the anchor included; strategy "noise" has the written token alone
    metric: Annotated[str, one_of(METRICS)] = "cosine"  # nearness of embedding rows
    until: str | None = "</think>"  # mixing ends for good once the response contains this; None: never
    refresh_every: Count = 1  # rollouts between two refreshes of the neighbour table
    # Whose rows are compared for neighbours: the input embedding's, or those of the output "head".
    table: Annotated[str, one_of(TABLES)] = "embedding"
    # Of the candidates: softmax of their logits (9), or of their "probs".
    weights: Annotated[str, one_of(WEIGHTS)] = "logits"
    # Written at a step that is mixed from neighbours: the anchor, or the "sampled" token.
    token: Annotated[str, one_of(TOKENS)] = "anchor"
    sigma: NonNegative = 0.33  # of strategy "noise", in multiples of the rms of the token's embedding
    # A regular expression: tokens whose text matches it are not mixed; None: every token may be.
    keep_out: Annotated[str, Check(bool, "a text that is not empty: every token matches that")] | None = None
    distinct_spelling: bool = False  # true: neighbours differ by more than case or a leading space

    def rules(self) -> Iterator[tuple[bool, str]]:
        strategy = STRATEGIES[self.strategy]
        for name in REFUSED_IF_UNREAD if strategy.mixes else ():
            value, default = getattr(self, name), getattr(type(self), name)
            yield (
                name in strategy.reads or value == default,
                f"mixing.{name} is {value!r}, which mixing.strategy {self.strategy!r} does not use; leave it "
                f"at {default!r}.",
            )

    def method(self, until_ids: tuple, keep_out_ids: tuple[int, ...] = ()) -> Mixing:
        """The algorithm's own description of these settings; ids stand for `until` and `keep_out`."""
        return Mixing(until_ids=until_ids, keep_out_ids=keep_out_ids, **self.select(Mixing))

    @property
    def active(self) -> bool:
        """Whether any input can ever be mixed."""
        return self.strategy != "none" and self.rate > 0


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings(Section, prefix="objective."):
    """The loss (13), and the choices around it.

    `importance_cap` and `old_logprobs` "sampler" are two corrections of the gap between sampler and learner.
    With "learner" the ratio is π_θ/π_learner, and the cap adds weights min(π_learner/π_sampler, cap), which
    needs both. With "sampler" the ratio π_θ/π_sampler contains that correction already.
    """

    algorithm: Annotated[str, one_of(ALGORITHMS)] = "grpo"
    clip_low: Annotated[float, Check(lambda value: 0 < value < 1, "above 0 and below 1")] = 0.2
    clip_high: Positive = 0.2
    # Bound on the loss of a bad response whose probability has grown; None: no bound.
    dual_clip: Annotated[float, Check(lambda value: value > 1, "above 1")] | None = 3.0
    kl_coef: NonNegative = 0.001  # beta, of the KL term in the loss; 0: no reference model is loaded
    kl_estimator: Annotated[str, one_of(KL_ESTIMATORS)] = "k3"
    scale_by_std: bool = True  # divide advantages by the group's standard deviation
    # Of token losses: mean over each response, then over responses; or over tokens; or a constant divisor.
    aggregate: Annotated[str, one_of(choices.AGGREGATES)] = "sequence"
    loss_on_mixed: bool = True  # false: tokens written at mixed steps have weight 0
    skip_zero_variance: bool = False  # true: groups of equal rewards are left out of the update, KL included
    # Responses cut off at the limit: "mask" leaves them out, "penalize" lowers their rewards.
    overlong: Annotated[str, one_of(choices.OVERLONG)] = "keep"
    overlong_penalty: Positive = 1.0  # what "penalize" takes off the reward of a response at its limit
    # Tokens before the limit over which the penalty grows from 0; 0: only cut-off responses have a penalty.
    overlong_interval: Natural = 0
    # Of the ratio: computed anew, or recorded by the "sampler", which saves a pass.
    old_logprobs: Annotated[str, one_of(choices.OLD_LOGPROBS)] = "learner"
    # Upper bound of the weights π_learner/π_sampler in the loss; None: no weights.
    importance_cap: Positive | None = None
    entropy_coef: NonNegative = 0.0  # of an entropy bonus in the loss

    def rules(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.importance_cap is None or self.old_logprobs == "learner",
            "objective.importance_cap is set with objective.old_logprobs 'sampler', whose ratio contains the "
            "correction already; use old_logprobs 'learner', or set importance_cap to None.",
        )
        yield (
            self.aggregate != "token" or not ALGORITHMS[self.algorithm].by_sequence,
            f"objective.aggregate is 'token' with objective.algorithm {self.algorithm!r}; a ratio per "
            "sequence needs 'sequence' or 'constant'.",
        )
        yield (
            self.overlong_interval == 0 or self.overlong == "penalize",
            f"objective.overlong_interval is {self.overlong_interval} with objective.overlong "
            f"{self.overlong!r}; it belongs to 'penalize'.",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Section, prefix="optimizer."):
    """AdamW with a linear warm-up."""

    learning_rate: Positive = 1e-6  # the peak
    warmup_steps: Natural = 0  # optimiser steps
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    clip_norm: Positive = 1.0  # of the global gradient
    # Of Adam's first moment. The second is always float32: in bfloat16 its small changes would round to none.
    moments_dtype: Annotated[str, one_of(choices.DTYPES)] = "float32"
    # Of the rate after the warm-up; wsd: constant, then linear to 0 in the last fifth.
    schedule: Annotated[str, one_of(choices.SCHEDULES)] = "constant"
    # Optimiser steps until the rate is 0, warm-up included; None with schedule "constant".
    decay_steps: Count | None = None

    def rules(self) -> Iterator[tuple[bool, str]]:
        decays = self.schedule != "constant"
        yield (
            decays == (self.decay_steps is not None),
            f"optimizer.schedule is {self.schedule!r} and optimizer.decay_steps is {self.decay_steps}; "
            "a schedule other than 'constant' needs a number of steps, and 'constant' none.",
        )
        yield (
            self.decay_steps is None or self.decay_steps > self.warmup_steps,
            f"optimizer.decay_steps is {self.decay_steps}; it must be above optimizer.warmup_steps "
            f"{self.warmup_steps}.",
        )


@dataclasses.dataclass(frozen=True)
class TrainSettings(Section, prefix="train."):
    """The loop and the layout of an update."""

    steps: Annotated[Count, MAY_CHANGE] = 625  # rollout batches: one epoch of 40k problems by 64
    mini_batch_prompts: Count = 16  # prompts an optimiser step
    row_tokens: Count | None = None  # tokens of a packed row; None: the longest prompt + response
    rows_per_device: Annotated[Count, MAY_CHANGE] = 1  # packed rows computed at once on each data shard
    remat: Annotated[str, one_of(choices.REMAT), MAY_CHANGE] = "full"  # what the backward pass recomputes
    # Tokens whose logits exist at once, on each data shard.
    logprob_chunk: Annotated[Count, MAY_CHANGE] = 1024
    # plain, chunked (anywhere), cudnn (NVIDIA), splash (TPU); auto: the fastest that the device has.
    attention: Annotated[str, one_of(choices.ATTENTION), MAY_CHANGE] = "auto"
    # True: layers written out, not scanned: a little faster, longer to compile.
    unroll: Annotated[bool, MAY_CHANGE] = False
    # True: a row has the prompt of a group once; pays where prompts are long.
    share_prompts: Annotated[bool, MAY_CHANGE] = False
    # To host memory between uses: "optimizer" (its state), "reference" (its parameters; under adapters the
    # base, which the reference model is), "both".
    offload: Annotated[str, one_of(choices.OFFLOAD), MAY_CHANGE] = "none"
    # Steps in a row with a loss or gradient that is not finite, whose update is skipped, that end a run.
    max_bad_steps: Annotated[Count, MAY_CHANGE] = 5
    # Where metrics go besides metrics.jsonl. For Weights & Biases set log.wandb, which names the project, and
    # not "wandb" here, whose project is ngrpo_jax.
    loggers: Annotated[tuple[str, ...], each_of(LOGGERS), MAY_CHANGE] = ("tensorboard",)
    # First step that is traced into WORKDIR/profile; None: no trace.
    profile_from: Annotated[Count | None, MAY_CHANGE] = None
    profile_steps: Annotated[Count, MAY_CHANGE] = 1  # steps that are traced


@dataclasses.dataclass(frozen=True)
class LogSettings(Section, prefix="log.", may_change=True):
    """Services that a run reports to; `train.loggers` has what needs no name."""

    # Project of Weights & Biases, or ENTITY/PROJECT; None: nothing is sent there.
    wandb: Annotated[str, Check(bool, "the name of a project")] | None = None


@dataclasses.dataclass(frozen=True)
class MeshSettings(Section, prefix="mesh.", may_change=True):
    """Devices along each axis; the product must be the number of devices."""

    data: Count = 1  # copies of the parameters
    fsdp: Count = 1  # shards of parameters and optimiser state
    tensor: Count = 1  # shards of matrix products


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Section, prefix="checkpoint.", may_change=True):
    """How often a checkpoint is made, which of them stay, and what a signal leaves time for."""

    every: Count = 20  # steps between two checkpoints; the last step always has one
    keep: Count = 3  # of the newest ones; the best one stays besides
    keep_every: Count | None = None  # checkpoints of steps that this divides stay for good; None: no others
    # Seconds after SIGTERM or Ctrl-C within which the step under way may still be finished.
    grace_s: NonNegative = 25.0
    best_metric: Annotated[str, one_of(choices.BEST_METRICS)] = "mean_at_n"


@dataclasses.dataclass(frozen=True)
class EvalSettings(Section, prefix="eval."):
    """Evaluation before, during (`every` steps) and after training, and by `evaluate`."""

    # Steps between two evaluations; None: only before and after training.
    every: Annotated[Count | None, MAY_CHANGE] = 20
    problems: Count | None = None  # the first so many held-out problems; None: all
    samples: Count = 32  # responses a problem (n of Mean@n)
    temperature: NonNegative = 0.6  # 0: greedy decoding
    top_p: Annotated[float, Check(lambda value: 0 < value <= 1, "above 0, at most 1")] = 0.95
    top_k: Natural = 0  # 0: all tokens
    max_new_tokens: Count = 8192
    # Each k of Pass@k; training reports the largest.
    pass_k: Annotated[
        tuple[int, ...], Check(lambda ks: ks and min(ks) > 0, "whole numbers above 0, such as (16, 32)")
    ] = (16, 32)
    mixing: bool = False  # true: evaluation mixes as the rollouts do
    # Of `evaluate`, each a source and options (docs/evaluation.md); (): data.eval.
    sets: Annotated[tuple[str, ...], MAY_CHANGE] = ()

    def rules(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.largest_k <= self.samples,
            f"eval.pass_k is {self.largest_k} but eval.samples is {self.samples}; Pass@k needs k samples.",
        )
        yield (
            not self.mixing or self.temperature > 0,
            "eval.mixing is true at eval.temperature 0; the weights of a mixture need a temperature above 0.",
        )

    @property
    def largest_k(self) -> int:
        """The k of the one Pass@k that a training run reports."""
        return max(self.pass_k)


@dataclasses.dataclass(frozen=True)
class RewardSettings(Section, prefix="reward."):
    """The grader and the limits of its worker processes."""

    kind: str = "math"  # "math", "choice" or package.module:function
    workers: Annotated[Count, MAY_CHANGE, at_most(256)] = 8  # grading processes
    # Seconds for one answer; a slower one is wrong.
    deadline_s: Annotated[Positive, MAY_CHANGE, at_most(3600)] = 5.0
    # MiB of one grading process.
    memory_mb: Annotated[int, MAY_CHANGE, at_least(choices.LEAST_GRADER_MB)] = 2048


@dataclasses.dataclass(frozen=True)
class Settings(Section, prefix=""):
    """All settings of a run, checked one by one and against each other."""

    # Of data order, rollouts and, with model.path "warm-start", of the model.
    seed: Annotated[int, at_least(0), INT64] = 0
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    warm_start: WarmStartSettings = WarmStartSettings()  # read only with model.path "warm-start"
    data: DataSettings = DataSettings()
    rollout: RolloutSettings = RolloutSettings()
    mixing: MixingSettings = MixingSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    log: LogSettings = LogSettings()
    mesh: MeshSettings = MeshSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalSettings = EvalSettings()
    reward: RewardSettings = RewardSettings()

    def rules(self) -> Iterator[tuple[bool, str]]:
        rollout, train = self.rollout, self.train
        yield (
            rollout.prompts % train.mini_batch_prompts == 0,
            f"rollout.prompts is {rollout.prompts}, no multiple of train.mini_batch_prompts "
            f"{train.mini_batch_prompts}; every optimiser step must have the same number of prompts.",
        )
        responses = rollout.prompts * rollout.group
        yield (
            responses <= MOST_RESPONSES,
            f"rollout.prompts × rollout.group is {responses} responses a step; at most {MOST_RESPONSES}.",
        )
        longest = self.data.max_prompt_tokens + rollout.max_new_tokens
        yield (
            train.row_tokens is None or train.row_tokens >= longest,
            f"train.row_tokens is {train.row_tokens}, shorter than the longest sequence of "
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}.",
        )
        objective, named = self.objective, f"rollout.quantize is {rollout.quantize!r}"
        yield (
            rollout.quantize is None or objective.old_logprobs == "learner",
            f"{named} with objective.old_logprobs 'sampler', whose ratio is then clipped for the rounding of "
            "weights rather than for updates; use old_logprobs 'learner' and set objective.importance_cap.",
        )
        yield (
            rollout.quantize is None or objective.importance_cap is not None,
            f"{named} without importance weights, though responses come from another distribution than the "
            "learner's; set objective.importance_cap, such as 2.0.",
        )
        yield (
            self.objective.overlong_interval < rollout.max_new_tokens,
            f"objective.overlong_interval is {self.objective.overlong_interval}; it must be below "
            f"rollout.max_new_tokens {rollout.max_new_tokens}.",
        )

    def with_slots(self, count: int) -> Self:
        """The same settings with so many `rollout.slots`."""
        return dataclasses.replace(self, rollout=dataclasses.replace(self.rollout, slots=count))

    @property
    def loggers(self) -> tuple[str, ...]:
        """Where metrics go besides metrics.jsonl."""
        chosen = (*self.train.loggers, *(["wandb"] if self.log.wandb else []))
        return tuple(dict.fromkeys(chosen))

    @property
    def mini_batches(self) -> int:
        """Optimiser steps of a rollout batch."""
        return self.rollout.prompts // self.train.mini_batch_prompts

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: those of the longest sequence unless train.row_tokens is set."""
        return self.train.row_tokens or self.data.max_prompt_tokens + self.rollout.max_new_tokens


def resolve(config: Any) -> Settings:
    """A ConfigDict of configs/ -> Settings, every setting checked.

    A setting that the ConfigDict lacks has its default. Raises UserError, naming the setting at fault.
    """
    tree, known = config.to_dict(), Settings.kinds()
    for name in flatten(tree):
        require(name in known, former(name) or f"the config has an unknown setting, {name}.")
    types = typing.get_type_hints(Settings)
    return Settings(**{name: types[name](**x) if isinstance(x, dict) else x for name, x in tree.items()})
