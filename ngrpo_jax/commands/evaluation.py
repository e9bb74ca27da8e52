"""Generate, grade, summarise: what train and evaluate share (command level)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.mixture import Mixture, cosine_to_anchor
from ngrpo_jax.analysis import passk
from ngrpo_jax.commands.composition import Language, ProblemSet, Source
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import engine
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.runtime import console, distributed, mesh
from ngrpo_jax.settings import Settings
from ngrpo_jax.tasks import prompts
from ngrpo_jax.tasks.rewards import Grader

COSINE_SAMPLE = 4096  # mixed inputs whose cosine to their anchor is taken; a fixed shape compiles once
_cosine_to_anchor = jax.jit(cosine_to_anchor)
EVAL_STREAM = 0  # rollouts of training step s draw from stream s, which counts from 1


@dataclasses.dataclass(frozen=True)
class Actor:
    """A model ready to write: rollout-layout parameters and all that its responses depend on."""

    params: Any
    config: ModelConfig
    language: Language
    table_VC: jax.Array | None
    sharding: jax.sharding.Sharding | None


def make_actor(source: Source, devices: jax.sharding.Mesh, params: Any, table_VC: Any | None) -> Actor:
    """The rollout's copy of parameters: compute dtype, a tree a layer, whole but for the tensor axis.

    Each host gets its own, on its own devices; every process has to call this.
    """
    laid_out = engine.lay_out(params, source.config)
    laid_out = mesh.on_this_host(laid_out, mesh.param_shardings(devices, laid_out, layout="tensor"))
    if table_VC is not None:
        table_VC = mesh.on_this_host(table_VC, mesh.replicated(devices))
    rows = mesh.rows_sharding(mesh.local_mesh(devices))
    return Actor(laid_out, source.config, source.language, table_VC, rows)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model wrote for some problems (P, n samples each), graded.

    The responses are those of this host's share of the problems; rewards and figures are of all.
    """

    trajectories: Trajectories
    texts: list[str]
    rewards_PN: np.ndarray
    figures: dict[str, float]


def sequence_keys(seed: int, stream: int, numbers_B: np.ndarray) -> jax.Array:
    """One key a sequence: a function of the run's seed, the stream (training step), and its number."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers_B))


def sequence_numbers(prompts: int, samples: int) -> np.ndarray:
    """The numbers of this host's sequences among those of all hosts, int [B], given its prompts.

    Hosts take turns prompt by prompt, as in ProblemStream; so a sequence has the key that it would have in a
    run of one process.
    """
    here = distributed.place()
    prompts_P = here.index + here.count * np.arange(prompts)
    return (prompts_P[:, None] * samples + np.arange(samples)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Draws:
    """How many responses, how long, and by which law."""

    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    mixes: bool


def training_draws(settings: Settings) -> Draws:
    """The rollouts of training."""
    own = settings.rollout
    return Draws(own.group, own.max_new_tokens, own.temperature, own.top_p, own.top_k, settings.mixing.active)


def evaluation_draws(settings: Settings) -> Draws:
    """The responses of an evaluation."""
    own = settings.eval
    mixes = own.mixing and settings.mixing.active
    return Draws(own.samples, own.max_new_tokens, own.temperature, own.top_p, own.top_k, mixes)


def write_responses(
    actor: Actor,
    prompt_ids: Sequence[Sequence[int]],
    settings: Settings,
    *,
    label: str,
    stream: int,
    draws: Draws,
) -> Trajectories:
    """Responses to each of this host's prompts, with a live line of sequences done, tokens and time left."""
    count, here = len(prompt_ids) * draws.samples, distributed.place()
    with console.Progress(label, count, "sequences", keep=False, enabled=here.primary) as progress:
        return engine.generate(
            actor.params,
            actor.config,
            prompt_ids,
            samples=draws.samples,
            max_new_tokens=draws.max_new_tokens,
            temperature=draws.temperature,
            top_p=draws.top_p,
            top_k=draws.top_k,
            mixing=actor.language.mixing if draws.mixes else None,
            table_VC=actor.table_VC if draws.mixes else None,
            stop_ids=actor.language.stop_ids,
            keys_B=sequence_keys(settings.seed, stream, sequence_numbers(len(prompt_ids), draws.samples)),
            slots=-(-settings.rollout.slots // here.count),
            chunk=settings.rollout.chunk,
            cache_length=settings.data.max_prompt_tokens + draws.max_new_tokens,
            sharding=actor.sharding,
            progress=lambda done, _, tokens: progress.update(done, f"{console.format_count(tokens)} tokens"),
        )


def evaluate_set(
    actor: Actor, held_out: ProblemSet, settings: Settings, grader: Grader, *, label: str
) -> Evaluation:
    """Mean@n and Pass@k of a model on held-out problems (METHOD section 6); each host writes its share."""
    samples, draws = settings.eval.samples, evaluation_draws(settings)
    share = distributed.place().share(len(held_out.problems))
    if share:
        own_prompts = [held_out.prompts[i] for i in share]
        trajectories = write_responses(
            actor, own_prompts, settings, label=label, stream=EVAL_STREAM, draws=draws
        )
    else:  # more hosts than problems
        candidates = actor.language.mixing.k if draws.mixes else 1
        trajectories = Trajectories.empty(0, draws.max_new_tokens, candidates)
    texts = response_texts(actor.language, trajectories)
    golds = [held_out.problems[i].answer for i in share for _ in range(samples)]
    rewards_B = np.asarray(grader.score(texts, golds, settings.reward.kind), np.float32)
    outcome = gather_outcome("evaluation", trajectories, rewards_B, samples)
    figures = {
        "mean_at_n": passk.mean_at_n(outcome.rewards_PG),
        "pass_at_k": passk.pass_at_k_mean(outcome.rewards_PG > 0.5, settings.eval.pass_k),
        "truncated": float(1.0 - outcome.stopped_B.mean()),
        "length_mean": float(outcome.lengths_B.mean()),
    }
    return Evaluation(trajectories, texts, outcome.rewards_PG, figures)


class Outcome(NamedTuple):
    """A rollout in numbers, over all hosts, in the order of a run of one process."""

    rewards_PG: np.ndarray
    lengths_B: np.ndarray
    stopped_B: np.ndarray
    mixed_B: np.ndarray  # mixed inputs of each response


def gather_outcome(name: str, trajectories: Trajectories, rewards_B: np.ndarray, samples: int) -> Outcome:
    """The outcome of all hosts from this one's graded responses. Every process has to call this."""
    mixed_B = trajectories.mixed_BT.sum(axis=1)
    own_B4 = np.stack([rewards_B, trajectories.lengths_B, trajectories.stopped_B, mixed_B], axis=1)
    own = own_B4.astype(np.float64).reshape(-1, samples, 4).tolist()
    all_PG4 = np.asarray(distributed.merge(name, own))
    return Outcome(
        all_PG4[..., 0].astype(np.float32),
        all_PG4[..., 1].astype(np.int32).reshape(-1),
        all_PG4[..., 2].astype(bool).reshape(-1),
        all_PG4[..., 3].astype(np.int32).reshape(-1),
    )


def response_texts(language: Language, trajectories: Trajectories) -> list[str]:
    """The text of each response, as it is graded."""
    count = len(trajectories.lengths_B)
    return [prompts.response_text(language.tokenizer, trajectories.response(i)) for i in range(count)]


def rollout_figures(actor: Actor, trajectories: Trajectories, outcome: Outcome) -> dict[str, float]:
    """Lengths, truncation and mixing of a rollout; cosines (Appendix E) over a sample of its mixed inputs.

    Args:
      trajectories: this host's.
      outcome: that of all hosts.
    """
    figures = {
        "rollout/length_mean": float(outcome.lengths_B.mean()),
        "rollout/length_max": float(outcome.lengths_B.max()),
        "rollout/truncated": float(1.0 - outcome.stopped_B.mean()),
        "rollout/mixed_fraction": float(outcome.mixed_B.sum() / outcome.lengths_B.sum()),
    }
    if outcome.mixed_B.any():
        figures |= _mixing_figures(actor, trajectories, outcome)
    return figures


def _mixing_figures(actor: Actor, trajectories: Trajectories, outcome: Outcome) -> dict[str, float]:
    """Cosine to the anchor and its weight, over COSINE_SAMPLE of all hosts' mixed inputs, spread evenly.

    Each host looks at those of the sample that it wrote, so that hosts do not change which they are.
    """
    prompts, samples = outcome.rewards_PG.shape
    own = len(distributed.place().share(prompts))
    starts_B = (np.cumsum(outcome.mixed_B) - outcome.mixed_B)[sequence_numbers(own, samples)]
    places = np.argwhere(trajectories.mixed_BT)
    before = np.concatenate([[0], np.cumsum(trajectories.mixed_BT.sum(axis=1))])
    numbers = starts_B[places[:, 0]] + np.arange(len(places)) - before[places[:, 0]]  # increasing
    sample = np.linspace(0, int(outcome.mixed_B.sum()) - 1, COSINE_SAMPLE).astype(int)
    mine = np.searchsorted(numbers, sample[np.isin(sample, numbers)])
    sums = [0, 0.0, np.inf, 0, 0.0]
    if len(mine):
        padded = np.concatenate([mine, np.zeros(COSINE_SAMPLE - len(mine), int)])
        mixture = _at(trajectories.mixtures, places[padded])
        embedding_VD = actor.params["embed"]["embedding"]
        cosine = np.asarray(_cosine_to_anchor(embedding_VD, mixture), np.float64)[: len(mine)]
        anchor = mixture.weights[: len(mine), 0].astype(np.float64)
        sums = [len(mine), cosine.sum(), cosine.min(), int((cosine < 0.95).sum()), anchor.sum()]
    counts, totals, least, below, anchors = zip(*distributed.exchange("cosines", sums), strict=True)
    return {
        "rollout/mix_cosine_mean": sum(totals) / sum(counts),
        "rollout/mix_cosine_min": min(least),
        "rollout/mix_cosine_below_095": sum(below) / sum(counts),
        "rollout/mix_anchor_weight": sum(anchors) / sum(counts),
    }


def _at(mixtures: Mixture, places_N2: np.ndarray) -> Mixture:
    rows_N, times_N = places_N2.T
    return Mixture(mixtures.ids[rows_N, times_N], mixtures.weights[rows_N, times_N])


def sample_row(
    language: Language, problem: Any, trajectories: Trajectories, index: int, reward: float, **extra: Any
) -> dict[str, Any]:
    """One response as a JSON row for samples.jsonl: text, verdict, and where its inputs were mixed."""
    tokens = trajectories.response(index)
    mixed = trajectories.mixed_BT[index, : len(tokens)]
    text, spans = prompts.mixed_spans(language.tokenizer, tokens, mixed)
    return {
        **extra,
        "id": problem.id,
        "problem": problem.problem,
        "answer": problem.answer,
        "response": text,
        "reward": float(reward),
        "mixed": spans,
        "tokens": len(tokens),
        "stopped": bool(trajectories.stopped_B[index]),
    }
