"""Settings: a ConfigDict from configs/ becomes frozen dataclasses, once, with every check made here.

`configs/base.py` declares each leaf with its default; the dataclasses below mirror its sections name for
name, and say what a value must be. Nothing else in the program sees a ConfigDict. A setting that cannot be
right raises ValueError with one sentence that names it. ml_collections is imported only where a ConfigDict
is at hand, so that the library rooms run without it.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any

from ngrpo_jax import choices
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.objectives import ALGORITHMS, KL_ESTIMATORS
from ngrpo_jax.errors import UserError, require


def _positive(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{section}.{name} is {value}; it must be above 0.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    require(value in known, f"{name} is {value!r}; it must be one of {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which checkpoint, and the dtype of its matrix products."""

    path: str
    revision: str | None
    dtype: str

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, choices.DTYPES)


@dataclasses.dataclass(frozen=True)
class WarmStartSettings:
    """The small model that `model.path = "warm-start"` makes, and its supervised training."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    steps: int
    batch: int
    learning_rate: float
    confidence_penalty: float

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self) if field.name != "confidence_penalty"]
        _positive("warm_start", self, *names)
        require(
            0 <= self.confidence_penalty < 1,
            f"warm_start.confidence_penalty is {self.confidence_penalty}; it must lie in [0, 1).",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"warm_start.hidden_size {self.hidden_size} is no multiple of "
            f"warm_start.num_heads {self.num_heads}.",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"warm_start.num_heads {self.num_heads} is no multiple of "
            f"warm_start.num_kv_heads {self.num_kv_heads}.",
        )


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where problems come from and how they become prompts."""

    train: str
    eval: str
    train_size: int | None
    prompt: str
    chat_template: str | None
    max_prompt_tokens: int
    overlap_with: str | None
    drop_overlap: bool

    def __post_init__(self) -> None:
        _one_of("data.prompt", self.prompt, choices.PROMPTS)
        _positive("data", self, "max_prompt_tokens")
        require(
            self.train_size is None or self.train_size > 0,
            f"data.train_size is {self.train_size}; it must be above 0, or None for all problems.",
        )

    @property
    def held_apart(self) -> tuple[str, ...]:
        """The sources whose problems should not be trained on."""
        more = (source.strip() for source in (self.overlap_with or "").split(";"))
        return tuple(dict.fromkeys([self.eval, *filter(None, more)]))


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How responses are drawn in training."""

    prompts: int
    group: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    slots: int
    chunk: int
    layout: str

    def __post_init__(self) -> None:
        _one_of("rollout.layout", self.layout, choices.LAYOUTS)
        _positive("rollout", self, "prompts", "max_new_tokens", "slots", "chunk")
        require(
            self.group >= 2,
            f"rollout.group is {self.group}; advantages compare the responses of a group, so it must be "
            "2 or more.",
        )
        require(
            self.temperature > 0,
            f"rollout.temperature is {self.temperature}; training divides logits by it, so it must be "
            "above 0.",
        )
        require(
            self.top_p == 1.0,
            f"rollout.top_p is {self.top_p}; training needs the untruncated law, so it must be 1.0.",
        )
        require(
            self.top_k == 0,
            f"rollout.top_k is {self.top_k}; training needs the untruncated law, so it must be 0.",
        )


@dataclasses.dataclass(frozen=True)
class MixingSettings:
    """Semantic Neighbor Mixing in rollouts (docs/method.md): strategy, rate rho, k with the anchor."""

    strategy: str
    rate: float
    k: int
    metric: str
    until: str | None
    refresh_every: int
    table: str
    weights: str
    token: str
    sigma: float
    keep_out: str | None
    distinct_spelling: bool

    def __post_init__(self) -> None:
        self.method(())
        _positive("mixing", self, "refresh_every")
        require(
            self.keep_out != "",
            "mixing.keep_out is empty, which every token matches; set it to None to keep none out.",
        )
        if self.strategy in ("soft", "gumbel", "noise"):
            for name, plain in dict(
                table="embedding", weights="logits", token="anchor", distinct_spelling=False
            ).items():
                value = getattr(self, name)
                require(
                    value == plain,
                    f"mixing.{name} is {value!r}, which mixing.strategy {self.strategy!r} has no use for; it "
                    "belongs to strategy 'neighbor'.",
                )

    def method(self, until_ids: tuple, keep_out_ids: tuple[int, ...] = ()) -> Mixing:
        """The algorithm's own description of these settings; ids stand for `until` and `keep_out`."""
        try:
            return Mixing(
                strategy=self.strategy,
                rate=self.rate,
                k=self.k,
                metric=self.metric,
                until_ids=until_ids,
                table=self.table,
                weights=self.weights,
                token=self.token,
                sigma=self.sigma,
                keep_out_ids=keep_out_ids,
            )
        except ValueError as error:
            raise UserError(f"mixing: {error}") from error

    @property
    def active(self) -> bool:
        """Whether any input can ever be mixed."""
        return self.strategy != "none" and self.rate > 0


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """The loss (13), and the choices around it.

    `importance_cap` and `old_logprobs` "sampler" are two answers to the gap between sampler and trainer. With
    "trainer" the ratio is π_θ/π_trainer, and the cap adds weights min(π_trainer/π_sampler, cap), which needs
    both. With "sampler" the ratio π_θ/π_sampler holds that correction already.
    """

    algorithm: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    scale_by_std: bool
    aggregate: str
    loss_on_mixed: bool
    kl_estimator: str
    skip_zero_variance: bool
    overlong: str
    overlong_penalty: float
    overlong_interval: int
    old_logprobs: str
    importance_cap: float | None
    entropy_coef: float

    def __post_init__(self) -> None:
        _one_of("objective.algorithm", self.algorithm, tuple(ALGORITHMS))
        _one_of("objective.aggregate", self.aggregate, choices.AGGREGATES)
        _one_of("objective.kl_estimator", self.kl_estimator, tuple(KL_ESTIMATORS))
        _one_of("objective.overlong", self.overlong, choices.OVERLONG)
        _one_of("objective.old_logprobs", self.old_logprobs, choices.OLD_LOGPROBS)
        self._check_clips()
        self._check_overlong()
        require(self.kl_coef >= 0, f"objective.kl_coef is {self.kl_coef}; it must be 0 or above.")
        require(
            self.entropy_coef >= 0, f"objective.entropy_coef is {self.entropy_coef}; it must be 0 or above."
        )
        require(
            self.importance_cap is None or self.importance_cap > 0,
            f"objective.importance_cap is {self.importance_cap}; it must be above 0, or None.",
        )
        require(
            self.importance_cap is None or self.old_logprobs == "trainer",
            "objective.importance_cap is set with objective.old_logprobs 'sampler', whose ratio holds the "
            "correction already; use old_logprobs 'trainer', or set importance_cap to None.",
        )

    def _check_overlong(self) -> None:
        require(
            self.overlong_penalty > 0,
            f"objective.overlong_penalty is {self.overlong_penalty}; it must be above 0 (it is taken off).",
        )
        require(
            self.overlong_interval >= 0,
            f"objective.overlong_interval is {self.overlong_interval}; it must be 0 or above.",
        )
        require(
            self.overlong_interval == 0 or self.overlong == "penalize",
            f"objective.overlong_interval is {self.overlong_interval} with objective.overlong "
            f"{self.overlong!r}; it belongs to 'penalize'.",
        )

    def _check_clips(self) -> None:
        require(
            not (self.algorithm == "gspo" and self.aggregate == "token"),
            "objective.aggregate is 'token' with objective.algorithm 'gspo'; a ratio per sequence needs "
            "'sequence' or 'constant'.",
        )
        require(
            0 < self.clip_low < 1 and self.clip_high > 0,
            f"objective.clip_low is {self.clip_low} and objective.clip_high {self.clip_high}; they must lie "
            "above 0, and clip_low below 1.",
        )
        require(
            self.dual_clip is None or self.dual_clip > 1,
            f"objective.dual_clip is {self.dual_clip}; it must be above 1, or None.",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a constant rate after a linear warm-up."""

    learning_rate: float
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        _positive("optimizer", self, "learning_rate", "eps", "clip_norm")
        require(
            self.warmup_steps >= 0 and self.weight_decay >= 0,
            f"optimizer.warmup_steps is {self.warmup_steps} and optimizer.weight_decay {self.weight_decay}; "
            "both must be 0 or above.",
        )
        require(
            0 <= self.b1 < 1 and 0 <= self.b2 < 1,
            f"optimizer.b1 is {self.b1} and optimizer.b2 {self.b2}; both must lie in [0, 1).",
        )


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The loop and the layout of an update."""

    steps: int
    mini_batch_prompts: int
    row_tokens: int | None
    rows_per_device: int
    remat: str
    logprob_chunk: int
    attention: str
    unroll: bool
    share_prompts: bool
    offload: str
    profile_from: int | None
    profile_steps: int

    def __post_init__(self) -> None:
        _positive("train", self, "steps", "mini_batch_prompts", "rows_per_device", "logprob_chunk")
        _positive("train", self, "profile_steps")
        require(
            self.profile_from is None or self.profile_from > 0,
            f"train.profile_from is {self.profile_from}; steps count from 1, and None traces none.",
        )
        _one_of("train.remat", self.remat, choices.REMAT)
        _one_of("train.attention", self.attention, choices.ATTENTION)
        _one_of("train.offload", self.offload, choices.OFFLOAD)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis: copies of the data, sharded parameters, sharded matrix products."""

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        _positive("mesh", self, "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """How often the run can be resumed from, and which held-out figure makes a checkpoint the best."""

    every: int
    best_metric: str

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every")
        _one_of("checkpoint.best_metric", self.best_metric, choices.BEST_METRICS)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Held-out figures: before, during (`every` steps) and after training, and by `evaluate`."""

    every: int | None
    problems: int | None
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    pass_k: tuple[int, ...]
    mixing: bool
    sets: tuple[str, ...]

    def __post_init__(self) -> None:
        _positive("eval", self, "samples", "max_new_tokens")
        require(
            bool(self.pass_k) and all(type(k) is int and k > 0 for k in self.pass_k),
            f"eval.pass_k is {self.pass_k}; it must be whole numbers above 0, such as (16, 32).",
        )
        require(
            all(isinstance(entry, str) for entry in self.sets),
            f"eval.sets is {self.sets}; it must be texts, each a data source with its options.",
        )
        require(
            self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0,
            f"eval.temperature {self.temperature} must be 0 or above, eval.top_p {self.top_p} in (0, 1], "
            f"eval.top_k {self.top_k} 0 or above.",
        )
        require(
            self.largest_k <= self.samples,
            f"eval.pass_k is {self.largest_k} but eval.samples is {self.samples}; Pass@k needs k samples.",
        )
        for name in ("every", "problems"):
            value = getattr(self, name)
            require(value is None or value > 0, f"eval.{name} is {value}; it must be above 0, or None.")
        require(
            not (self.mixing and self.temperature == 0),
            "eval.mixing is true at eval.temperature 0; the weights of a mixture need a temperature above 0.",
        )

    @property
    def largest_k(self) -> int:
        """The k of the one Pass@k that a training run reports."""
        return max(self.pass_k)


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The grader and the limits of its worker processes."""

    kind: str
    workers: int
    deadline_s: float
    memory_mb: int

    def __post_init__(self) -> None:
        _positive("reward", self, "workers", "deadline_s")
        require(
            self.memory_mb >= choices.LEAST_GRADER_MB,
            f"reward.memory_mb is {self.memory_mb}; a grader's process needs at least "
            f"{choices.LEAST_GRADER_MB}.",
        )


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run, checked one by one and against each other."""

    seed: int
    model: ModelSettings
    warm_start: WarmStartSettings
    data: DataSettings
    rollout: RolloutSettings
    mixing: MixingSettings
    objective: ObjectiveSettings
    optimizer: OptimizerSettings
    train: TrainSettings
    mesh: MeshSettings
    checkpoint: CheckpointSettings
    eval: EvalSettings
    reward: RewardSettings

    def __post_init__(self) -> None:
        rollout, train = self.rollout, self.train
        require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or above.")
        require(
            rollout.prompts % train.mini_batch_prompts == 0,
            f"rollout.prompts is {rollout.prompts}, no multiple of train.mini_batch_prompts "
            f"{train.mini_batch_prompts}; every optimiser step must see the same number of prompts.",
        )
        longest = self.data.max_prompt_tokens + rollout.max_new_tokens
        require(
            train.row_tokens is None or train.row_tokens >= longest,
            f"train.row_tokens is {train.row_tokens}, shorter than the longest sequence of "
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}.",
        )
        require(
            self.objective.overlong_interval < rollout.max_new_tokens,
            f"objective.overlong_interval is {self.objective.overlong_interval}; it must be below "
            f"rollout.max_new_tokens {rollout.max_new_tokens}.",
        )

    @property
    def mini_batches(self) -> int:
        """Optimiser steps of a rollout batch."""
        return self.rollout.prompts // self.train.mini_batch_prompts

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: the longest sequence where nothing else is asked for."""
        return self.train.row_tokens or self.data.max_prompt_tokens + self.rollout.max_new_tokens


def resolve(config: Any) -> Settings:
    """A (locked) ConfigDict made by configs/*.py -> Settings. ValueError names the setting at fault."""
    values = config.to_dict()
    sections = typing.get_type_hints(Settings)
    _same_names("the config", values, sections)
    resolved: dict[str, Any] = {}
    for name, kind in sections.items():
        if kind is int:
            resolved[name] = values[name]
            continue
        wanted = typing.get_type_hints(kind)
        _same_names(f"section {name!r} of the config", values[name], wanted)
        for leaf, value in values[name].items():
            optional = type(None) in typing.get_args(wanted[leaf])
            require(value is not None or optional, f"{name}.{leaf} is None; it needs a value.")
            endless = isinstance(value, float) and not math.isfinite(value)
            require(not endless, f"{name}.{leaf} is {value}; it must be a finite number.")
        resolved[name] = kind(**values[name])
    return Settings(**resolved)


def _same_names(what: str, given: Any, wanted: Any) -> None:
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    require(not missing, f"{what} lacks {', '.join(missing)}; derive it from configs/base.py.")
    require(not unknown, f"{what} has unknown settings: {', '.join(unknown)}; configs/base.py has them all.")
