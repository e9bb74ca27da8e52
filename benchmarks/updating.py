"""The learner's update by itself: seconds of a microbatch and of an optimiser step, MFU, memory.

`_Learner` is all that any benchmark here knows of learner/update.py.
"""

from __future__ import annotations

import time

import jax
import numpy as np

from benchmarks import bounds, measure, shapes
from ngrpo_jax.algo.mixture import Mixture
from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.advantages import token_weights
from ngrpo_jax.learner.loss import ForwardOptions
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.model import attention
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.decoder import parameter_count
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.settings import ObjectiveSettings, OptimizerSettings

K = 3
# float32: parameters, two moments, the sum of gradients and the microbatch that is added to it.
STATE_BYTES = 5 * 4
LOGPROB_CHUNK = 1024
OBJECTIVE = ObjectiveSettings(
    algorithm="grpo",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=3.0,
    kl_coef=0.0,
    scale_by_std=True,
    aggregate="sequence",
    loss_on_mixed=True,
    kl_estimator="k3",
    skip_zero_variance=False,
    overlong="keep",
    overlong_penalty=1.0,
    overlong_interval=0,
    old_logprobs="learner",
    importance_cap=None,
    entropy_coef=0.0,
)
OPTIMIZER = OptimizerSettings(
    learning_rate=1e-6, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0
)


def report_update(
    report: measure.Report,
    config: ModelConfig,
    rows: int,
    tokens: int,
    *,
    rounds: int,
    memory: int | None,
    product: int,
) -> None:
    """Adds the table: a microbatch of `rows` full rows of `tokens` tokens on one device.

    Args:
      memory: bytes of the device; None where nobody tells.
      product: rows and columns of the large matrix product whose rate is the measure of MFU.
    """
    need = STATE_BYTES * parameter_count(config)
    if memory is not None and need > memory:
        report.table(
            "Update",
            ("", ""),
            [("does not fit", f"{need / 1e9:.0f} GB of state, the device has {memory / 1e9:.0f} GB")],
        )
        return
    rate = bounds.product_rate(product, product, product, config.dtype)
    learner = _Learner(config, rows, tokens)
    sides = {
        "log-probabilities": learner.logprobs,
        "gradient": learner.gradient,
        "optimiser step": learner.step,
    }
    timings = measure.alternate(sides, rounds)
    count = rows * tokens
    head = config.vocab_size * config.hidden_size
    forward = count * (2 * (shapes.matrix_parameters(config) - head) + shapes.attention_flops(config, tokens))
    forward += rows * _responses(tokens) * 2 * head  # the head is needed at response positions alone
    flops = {"log-probabilities": forward, "gradient": 3 * forward, "optimiser step": None}
    lines = []
    for name, work in flops.items():
        seconds = timings.each(name)
        share = None if work is None else work / rate / seconds.median
        lines.append((name, seconds, None if work is None else count / seconds.median, share))
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    report.table(
        f"Update: {rows} × {tokens} tokens, remat full, {config.dtype}, one device",
        ("", "seconds", "tokens/s", "share of the product's rate"),
        lines,
        f"{timings.note()}. Operations that the model needs (a gradient: three times a forward pass), not "
        f"those that recomputation adds; a product of {product}³ reaches {rate / 1e12:.3g} TFLOP/s here.",
        "Peak memory of the device: " + ("not told." if used is None else f"{used / 1e9:.1f} GB."),
    )


class _Learner:
    """Compiled programs, a state and one microbatch; each method is a side that returns its seconds."""

    def __init__(self, config: ModelConfig, rows: int, tokens: int) -> None:
        optimizer = make_optimizer(OPTIMIZER)
        auto = (jax.sharding.AxisType.Auto,) * 3
        device = jax.make_mesh(
            (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=auto, devices=jax.devices()[:1]
        )
        platform = jax.devices()[0].platform
        implementation = attention.choose(
            "auto",
            platform=platform,
            row_tokens=tokens,
            shared_prefixes=False,
            dtype=config.dtype,
        )
        here = jax.sharding.NamedSharding(device, jax.sharding.PartitionSpec())
        params = shapes.random_params(config, stacked=True, dtype="float32")
        self._state = jax.jit(
            lambda params: update.init_state(params, optimizer), donate_argnums=0, out_shardings=here
        )(params)
        self._programs = update.compile_programs(
            ForwardOptions(config, 1.0, "full", LOGPROB_CHUNK, attention.make(implementation, platform)),
            OBJECTIVE,
            optimizer,
            state_shardings=jax.tree.map(lambda _: here, self._state),
            rows_sharding=here,
        )
        microbatches = [_rows(config, rows, tokens)]
        (self._batch,) = update.compute_logprobs(self._programs, self._state.params, None, [microbatches])
        self._sums: update.Sums | None = None

    def logprobs(self) -> float:
        """Log-probabilities of the microbatch under the present parameters."""
        given = self._batch[0]._replace(old_logprobs_MRT=None)
        return measure.seconds_of(lambda: self._programs.logprobs(self._state.params, given))

    def gradient(self) -> float:
        """The gradient of the microbatch, added to a sum of zeros."""
        self._sums = None  # a run holds no gradient of an earlier step either
        start = time.perf_counter()
        self._sums = update.gradients(self._programs, self._state.params, self._batch)
        jax.block_until_ready(self._sums)
        return time.perf_counter() - start

    def step(self) -> float:
        """The optimiser's step with the last gradient."""
        if self._sums is None:
            self.gradient()
        start = time.perf_counter()
        self._state, _ = self._programs.apply(self._state, self._sums)
        jax.block_until_ready(self._state)
        self._sums = None
        return time.perf_counter() - start


def _responses(tokens: int) -> int:
    """Response tokens of a row of so many tokens; the last one is no input."""
    return tokens - tokens // 2 + 1


def _rows(config: ModelConfig, rows: int, tokens: int) -> packing.Rows:
    """Full rows of one sequence each: half prompt, half response, a tenth of it written at mixed steps."""
    draw = np.random.default_rng(0)
    prompt, new = tokens // 2, _responses(tokens)
    ids_BT = draw.integers(config.vocab_size, size=(rows, new)).astype(np.int32)
    ids_BTC = draw.integers(config.vocab_size, size=(rows, new, K)).astype(np.int32)
    ids_BTC[..., 0] = ids_BT
    mixed_BT = draw.random((rows, new)) < 0.1
    weights_BTC = np.where(mixed_BT[..., None], [0.6, 0.3, 0.1], [1.0, 0.0, 0.0]).astype(np.float32)
    lengths_B = np.full(rows, new, np.int32)
    written = Trajectories(
        tokens_BT=ids_BT,
        lengths_B=lengths_B,
        mixtures=Mixture(ids_BTC, weights_BTC),
        mixed_BT=mixed_BT,
        logprobs_BT=np.full((rows, new), -1.0, np.float32),
        stopped_B=np.zeros(rows, bool),
        nonfinite_B=np.zeros(rows, bool),
    )
    weight_BT = token_weights(written, OBJECTIVE)
    prompts = draw.integers(config.vocab_size, size=(rows, prompt)).tolist()
    batch = packing.Batch(prompts, written, np.resize([1.0, -1.0], rows))
    return packing.pack(batch, weight_BT, packing.RowLayout(tokens, rows))
