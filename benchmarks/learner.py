"""The learner against TRL's GRPOTrainer, against the matrix products it cannot do without, and its memory.

    python benchmarks/learner.py [--update] [--step] [--memory] [--model=DIR] [--peer-python=PATH]

Without a choice of cases: the update. Without --model: random weights in the shape of a small Qwen2. Without
--peer-python: no TRL. 8 prompts × 4 samples, 64 prompt and 128 response tokens, KL term on. Both sides run in
turn; medians. benchmarks/README.md says how to make the peer's environment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measure, shapes, updating
from benchmarks.peer import Peer
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.objectives import group_advantages
from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.loss import ForwardOptions, row_loss
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.model import attention, decoder, hf, lora
from ngrpo_jax.model.config import Lora, ModelConfig
from ngrpo_jax.model.flops import forward_flops
from ngrpo_jax.rollout import engine
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import mesh as meshes

OBJECTIVE = dataclasses.replace(updating.OBJECTIVE, kl_coef=0.001)
SAMPLES, PROMPT, NEW = 4, 64, 128
BLOCKS_OF_GROUP = math.ceil((PROMPT - 1 + SAMPLES * NEW) / attention.BLOCK)
ROW = BLOCKS_OF_GROUP * attention.BLOCK  # a row that ends with a block needs no filling
OURS, PEER = "this learner", "TRL GRPOTrainer"
GIB = 2**30
TABLES_HELD = 4  # buffers as large as the embedding while a microbatch's gradient is taken


class Ours:
    """A model, its programs and a batch of responses of random tokens; every method returns seconds."""

    def __init__(self, config: ModelConfig, params: Any, given: argparse.Namespace) -> None:
        self.config, self.given = config, given
        mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        optimizer = make_optimizer(updating.OPTIMIZER)
        params = jax.device_put(params)
        trained, base = lora.split(params)
        dtype = config.dtype if config.lora is None else "float32"
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), trained)
        self.reference = lora.joined(base, copy)
        start = functools.partial(update.init_state, optimizer=optimizer)
        shardings = meshes.state_shardings(mesh, jax.eval_shape(start, params))
        moments = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
        self.state = update.TrainState(params, moments)
        self.programs = update.compile_programs(
            forward_options(config, given),
            OBJECTIVE,
            optimizer,
            state_shardings=shardings,
            rows_sharding=meshes.rows_sharding(mesh),
        )
        self.prompts = prompts(config, given.prompts)
        self.phases: dict[str, list[float]] = {"rollout": [], "logprobs": [], "update": []}
        self.trajectories = random_responses(config, given.prompts * SAMPLES)
        self.fill = 0.0

    def update(self) -> float:
        """Packing, the reference's log-probabilities and one optimiser step; the seconds of the last."""
        batches = self._batches()
        self._phase("logprobs", lambda: self._logprobs(batches))
        return self._phase("update", self._update)

    def step(self) -> float:
        """A whole step: rollout, reward (random numbers), update."""
        start = time.perf_counter()
        self._phase("rollout", self._rollout)
        self.update()
        return time.perf_counter() - start

    def _rollout(self) -> None:
        self.trajectories = engine.generate(
            self.state.params,
            self.config,
            self.prompts,
            samples=SAMPLES,
            max_new_tokens=NEW,
            temperature=1.0,
            mixing=Mixing(strategy="none"),
            stop_ids=(),
        )

    def _batches(self) -> list[list[packing.Rows]]:
        rewards_PG = np.random.default_rng(0).normal(size=(len(self.prompts), SAMPLES))
        batch = packing.Batch(
            [prompt for prompt in self.prompts for _ in range(SAMPLES)],
            self.trajectories,
            np.asarray(group_advantages(rewards_PG)).reshape(-1),
        )
        layout = packing.RowLayout(self.given.row_tokens, self.given.rows, not self.given.unshared)
        batches = packing.mini_batches(batch, OBJECTIVE, layout, count=1)
        self.fill = packing.fill_fraction(batches)
        return batches

    def _logprobs(self, batches: list[list[packing.Rows]]) -> Any:
        self._microbatches = update.compute_logprobs(
            self.programs, self.state.params, self.reference, batches, old="update"
        )
        return self._microbatches

    def _update(self) -> Any:
        self.state, metrics = update.update(self.programs, self.state, self._microbatches)
        return self.state, metrics

    def _phase(self, name: str, work: Callable[[], Any]) -> float:
        self.phases[name].append(measure.seconds_of(work))
        return self.phases[name][-1]


def main() -> None:
    """Measures the chosen cases and prints their tables."""
    given = arguments()
    with contextlib.ExitStack() as stack:
        config, params, directory = load_model(given, stack.enter_context(tempfile.TemporaryDirectory()))
        report = measure.Report(f"Learner: {given.model or given.shape}, {config.dtype}")
        if given.update or given.step:
            ours = Ours(config, params, given)
            del params
            peer = None
            if given.peer_python:
                peer = stack.enter_context(Peer(given.peer_python, "trl_grpo.py"))
                peer.ask("load", **_load_request(directory, ours, given))
            against_peer(report, ours, peer, given)
            against_products(report, ours, given)
        if given.memory:
            memory_of_vocabulary(report, given)
            memory_of_length(report, given)
        report.save(given.json)


def against_peer(report: measure.Report, ours: Ours, peer: Peer | None, given: argparse.Namespace) -> None:
    """The update alone, or the whole step, in turn with TRL's."""
    answers: list[dict[str, float]] = []

    def theirs() -> float:
        assert peer is not None
        answers.append(peer.ask("step", generate=given.step))
        return answers[-1]["seconds" if given.step else "update"]

    sides = {OURS: ours.step if given.step else ours.update}
    if peer is not None:
        sides[PEER] = theirs
    measure.reset_peak_rss()
    pids = [peer.pid] if peer else []
    timings = measure.alternate(sides, given.rounds, warmups=given.warmups, rest_s=0.3, pids=pids)
    peaks = {OURS: measure.peak_rss()} | ({PEER: int(answers[-1]["peak_rss"])} if peer else {})
    tokens = given.prompts * SAMPLES * (PROMPT + NEW)
    ratio = {OURS: None} | ({PEER: timings.ratio(PEER, OURS)} if peer else {})
    rows = [
        (name, timings.each(name), tokens / timings.each(name).median, ratio[name], peaks[name] / GIB)
        for name in timings.seconds
    ]
    what = "Whole step" if given.step else "Update alone"
    phases = {name: _last_median(seconds, given.rounds) for name, seconds in ours.phases.items()}
    notes = [f"{OURS}: {_said(phases)}; rows filled to {100 * ours.fill:.1f} %."]
    if answers:
        theirs_by_phase = {
            name: _last_median([answer[key] for answer in answers], given.rounds)
            for name, key in (("rollout", "generate"), ("logprobs", "score"), ("update", "update"))
        }
        notes.append(f"{PEER}: {_said(theirs_by_phase)}.")
    report.table(
        f"{what}: {given.prompts} prompts × {SAMPLES}, {PROMPT} + {NEW} tokens",
        ("", "seconds", "tokens/s", f"it / {OURS}", "peak memory, GiB"),
        rows,
        timings.note() + ".",
        *notes,
    )


def against_products(report: measure.Report, ours: Ours, given: argparse.Namespace) -> None:
    """Each phase's share of the time of its weight products alone, at the size of a microbatch."""
    positions = given.rows * given.row_tokens
    prompts_once = 1 if not given.unshared else SAMPLES
    packed = given.prompts * (prompts_once * (PROMPT - 1) + SAMPLES * NEW)
    responses = given.prompts * SAMPLES * NEW
    forward, backward = layer_products(ours.config, positions)
    head_forward, head_backward = head_products(ours.config, min(given.chunk, positions))
    rows = []
    for name, seconds in (
        ("logprobs", forward * packed + head_forward * responses),
        ("update", (forward + backward) * packed + (head_forward + head_backward) * responses),
    ):
        taken = _last_median(ours.phases[name], given.rounds)
        rows.append((name, taken, seconds, seconds / taken))
    flops = forward_flops(ours.config, PROMPT, NEW) * given.prompts * SAMPLES
    report.table(
        "Against the weight products alone",
        ("phase", "seconds", "its products", "share"),
        rows,
        f"Products of {packed} positions and {responses} response tokens, each measured alone at the size of "
        f"a microbatch of {positions} positions. A pass over unshared sequences: {flops / 1e12:.2f} TFLOP.",
    )


def memory_of_vocabulary(report: measure.Report, given: argparse.Namespace) -> None:
    """Memory of a microbatch's gradient as the vocabulary grows, with what is the table's own left out."""
    rows = []
    for vocabulary in (32_000, 152_000):
        config = dataclasses.replace(shapes.SHAPES["smollm2"], vocab_size=vocabulary)
        held = gradient_memory(config, given, given.row_tokens)
        tables = TABLES_HELD * vocabulary * config.hidden_size * 4
        rows.append((vocabulary, held / GIB, (held - tables) / GIB))
    report.table(
        f"Memory of a microbatch's gradient and vocabulary: SmolLM2's body, {given.rows} rows of "
        f"{given.row_tokens} tokens, logits of {given.chunk} at once",
        ("vocabulary", "GiB", "without tables, GiB"),
        rows,
        f"The body is the same; 152k over 32k: {rows[1][2] / rows[0][2]:.3f} (goal: at most 1.15).",
        "Tables are the parameter, its gradient's sum, and the microbatch's gradients by head and look-up.",
    )


def memory_of_length(report: measure.Report, given: argparse.Namespace) -> None:
    """Working memory of a microbatch's gradient as its one row grows, with every layer recomputed."""
    config = dataclasses.replace(shapes.SHAPES["smollm2"], num_layers=6, vocab_size=4096)
    rows = []
    for name in ("plain", "chunked"):
        for length in (1024, 2048, 4096):
            one = argparse.Namespace(**{**vars(given), "rows": 1, "remat": "full", "attention": name})
            rows.append((name, length, gradient_memory(config, one, length) / GIB))
    report.table(
        "Memory of a microbatch's gradient and length", ("attention", "tokens of the row", "GiB"), rows
    )


def gradient_memory(config: ModelConfig, given: argparse.Namespace, row_tokens: int) -> int:
    """Bytes that a microbatch's gradient takes by XLA's account: parameters, their gradients, and scratch."""
    shapes_of = functools.partial(jax.eval_shape, lambda: decoder.init(jax.random.key(0), config))
    params = shapes_of()
    like = Trajectories.empty(1, 1, 1).mixtures
    rows = packing.empty_rows(given.rows, row_tokens, like)
    token = jax.ShapeDtypeStruct((given.rows, row_tokens), jnp.float32)
    loss = functools.partial(row_loss, objective=OBJECTIVE, options=forward_options(config, given))

    def accumulate(total, params, rows, ref_RT):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, rows, None, ref_RT)
        return jax.tree.map(jnp.add, total, grads), metrics

    compiled = jax.jit(accumulate, donate_argnums=0).lower(params, params, rows, token).compile()
    held = compiled.memory_analysis()
    return held.temp_size_in_bytes + held.argument_size_in_bytes  # the sum comes back where it was


def layer_products(config: ModelConfig, tokens: int) -> tuple[float, float]:
    """Seconds a token of all layers' weight products, forward and backward, each measured alone."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    kernels = {
        (D, config.num_heads * H): 1,
        (config.num_heads * H, D): 1,
        (D, config.num_kv_heads * H): 2,
        (D, F): 2,
        (F, D): 1,
    }
    forward = backward = 0.0
    for (inner, outer), count in kernels.items():
        there, back = _products(tokens, inner, outer, config.dtype)
        forward += count * there
        backward += count * back
    return config.num_layers * forward / tokens, config.num_layers * backward / tokens


def head_products(config: ModelConfig, tokens: int) -> tuple[float, float]:
    """Seconds a token of the head's product, forward and backward."""
    there, back = _products(tokens, config.hidden_size, config.vocab_size, config.dtype)
    return there / tokens, back / tokens


def _products(tokens: int, inner: int, outer: int, dtype: str) -> tuple[float, float]:
    """Seconds of x·W, and of its two gradients."""
    x, w, g = (jnp.ones(shape, dtype) for shape in ((tokens, inner), (inner, outer), (tokens, outer)))

    def seconds(contract: tuple[int, int], left: jax.Array, right: jax.Array) -> float:
        dims = (((contract[0],), (contract[1],)), ((), ()))
        product = jax.jit(functools.partial(jax.lax.dot_general, dimension_numbers=dims))
        jax.block_until_ready(product(left, right))
        return float(np.median([measure.seconds_of(lambda: product(left, right)) for _ in range(5)]))

    return seconds((1, 0), x, w), seconds((1, 1), g, w) + seconds((0, 0), x, g)


def forward_options(config: ModelConfig, given: argparse.Namespace) -> ForwardOptions:
    """How log-probabilities are computed in this run of the benchmark."""
    name = attention.choose(
        given.attention,
        platform=jax.devices()[0].platform,
        row_tokens=given.row_tokens,
        shared_prefixes=not given.unshared,
        dtype=config.dtype,
    )
    return ForwardOptions(
        config,
        1.0,
        given.remat,
        given.chunk,
        attention.make(name, jax.devices()[0].platform, block=given.block),
        given.unroll,
    )


def prompts(config: ModelConfig, count: int) -> list[list[int]]:
    """Prompts of random ids."""
    return np.random.default_rng(0).integers(3, config.vocab_size, (count, PROMPT)).tolist()


def random_responses(config: ModelConfig, count: int) -> Trajectories:
    """Responses of random ids, as if the sampler had been unsure of each."""
    made = Trajectories.empty(count, NEW, 1)
    made.lengths_B[:] = NEW
    made.tokens_BT[:] = np.random.default_rng(1).integers(3, config.vocab_size, (count, NEW))
    made.mixtures.ids[..., 0] = made.tokens_BT
    made.logprobs_BT[:] = -np.log(config.vocab_size)
    return made


def load_model(
    given: argparse.Namespace, folder: str, *, for_peer: bool = False
) -> tuple[ModelConfig, Any, str]:
    """The model as (config, parameters, a directory that the peer can read)."""
    if given.model:
        config, params = hf.load(given.model)
        return *_with_adapters(dataclasses.replace(config, dtype=given.dtype), params, given), given.model
    config = dataclasses.replace(shapes.SHAPES[given.shape], dtype=given.dtype)
    params = shapes.random_params(config, stacked=True, dtype="float32")
    if given.peer_python or for_peer:
        hf.save(folder, config, jax.device_get(params))
    return *_with_adapters(config, params, given), folder


def _with_adapters(config: ModelConfig, params: Any, given: argparse.Namespace) -> tuple[ModelConfig, Any]:
    """The model with fresh adapters of rank --lora on all matrices of its layers; as it is without one."""
    if given.lora is None:
        return config, params
    adapters = Lora(given.lora, 32 / given.lora, lora.find_targets(config, "all"))
    base = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    fresh = lora.init(jax.random.key(0), config, adapters)
    return dataclasses.replace(config, lora=adapters), lora.joined(base, fresh)


def _load_request(directory: str, ours: Ours, given: argparse.Namespace) -> dict[str, Any]:
    return dict(
        model=str(pathlib.Path(directory).resolve()),
        threads=os.cpu_count(),
        prompts=ours.prompts,
        samples=SAMPLES,
        new_tokens=NEW,
        kl_coef=OBJECTIVE.kl_coef,
        learning_rate=updating.OPTIMIZER.learning_rate,
        recompute=not given.peer_keeps,
    )


def _last_median(seconds: list[float], rounds: int) -> float:
    return float(np.median(seconds[-rounds:])) if seconds else 0.0


def _said(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items() if seconds)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for case in ("update", "step", "memory"):
        parser.add_argument(f"--{case}", action="store_true")
    parser.add_argument("--model", help="a Hugging Face directory; else random weights of --shape")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--dtype", default="float32", help="of matrix products")
    parser.add_argument("--peer-python", help="the python of an environment with TRL")
    parser.add_argument("--peer-keeps", action="store_true", help="TRL keeps activations, not its default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=ROW, help="of a row; by default a group fills it")
    parser.add_argument("--rows", type=int, default=2, help="of a microbatch")
    parser.add_argument("--chunk", type=int, default=512, help="tokens whose logits exist at once")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--block", type=int, default=attention.BLOCK, help="of chunked attention")
    parser.add_argument("--lora", type=int, help="rank of adapters, which alone are trained then")
    parser.add_argument("--unroll", action="store_true", help="write the layers out")
    parser.add_argument("--unshared", action="store_true", help="every sequence has its prompt to itself")
    parser.add_argument("--json", help="a file for all figures")
    given = parser.parse_args(argv)
    if not (given.update or given.step or given.memory):
        given.update = True
    return given


if __name__ == "__main__":
    main()
