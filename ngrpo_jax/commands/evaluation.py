"""Generate, grade, summarise: what train and evaluate share (command level)."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngrpo_jax.algo.mixture import Mixture, cosine_to_anchor
from ngrpo_jax.analysis import benchmark, geometry
from ngrpo_jax.commands.answers import final_answer, vote
from ngrpo_jax.commands.composition import Language, ProblemSet, Source
from ngrpo_jax.commands.evalsets import set_name
from ngrpo_jax.model import columns
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
    sharding: jax.sharding.NamedSharding


def make_actor(
    source: Source, devices: jax.sharding.Mesh, params: Any, table_VC: Any | None, layout: str
) -> Actor:
    """The rollout's copy of parameters: compute dtype, laid out for decoding, split as `layout` says.

    Each host gets its own, on its own devices; every process has to call this.
    """
    laid_out = columns.lay_out(params, source.config)
    laid_out = mesh.on_this_host(laid_out, mesh.param_shardings(devices, laid_out, layout=layout))
    if table_VC is not None:
        table_VC = mesh.on_this_host(table_VC, mesh.replicated(devices))
    slots = mesh.slots_sharding(mesh.local_mesh(devices), layout)
    return Actor(laid_out, source.config, source.language, table_VC, slots)


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


def evaluation_keys(seed: int, name: str, problems: Sequence[int], samples: int) -> jax.Array:
    """One key a response of these problems of a data set, prompt-major.

    A function of the seed, the set's name, the problem's number and the sample's number alone: what a
    response becomes depends neither on where an evaluation was interrupted nor on how many samples it draws.
    """
    key = jax.random.fold_in(jax.random.key(seed), EVAL_STREAM)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    numbers_B2 = np.stack(np.meshgrid(problems, range(samples), indexing="ij"), axis=-1).reshape(-1, 2)
    by_problem = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers_B2[:, 0]))
    return jax.vmap(jax.random.fold_in)(by_problem, jnp.asarray(numbers_B2[:, 1]))


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


def own_slots(settings: Settings) -> int:
    """This host's part of `rollout.slots`."""
    return -(-settings.rollout.slots // distributed.place().count)


def write_responses(
    actor: Actor,
    prompt_ids: Sequence[Sequence[int]],
    settings: Settings,
    *,
    label: str,
    stream: int,
    draws: Draws,
    keys_B: jax.Array | None = None,
    progress: console.Progress | None = None,
    done_before: int = 0,
) -> Trajectories:
    """Responses to each of this host's prompts, with a live line of sequences done, tokens and time left.

    Args:
      keys_B: the sequences' keys; None for those of the seed and the stream.
      progress: a line that these responses are part of; None for one of their own.
      done_before: sequences that this line already counts.
    """
    count, here = len(prompt_ids) * draws.samples, distributed.place()
    own_line = None
    if progress is None:
        own_line = console.Progress(label, count, "sequences", keep=False, enabled=here.primary)
    if keys_B is None:
        keys_B = sequence_keys(settings.seed, stream, sequence_numbers(len(prompt_ids), draws.samples))
    with own_line or contextlib.nullcontext(progress) as line:
        assert line is not None
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
            keys_B=keys_B,
            slots=own_slots(settings),
            chunk=settings.rollout.chunk,
            max_prompt_tokens=settings.data.max_prompt_tokens,
            sharding=actor.sharding,
            progress=lambda stats: line.update(done_before + stats.done, _in_words(stats)),
        )


def compile_ahead(actor: Actor, settings: Settings, draws: Draws) -> float:
    """Compiles everything that `write_responses` will need for such draws; seconds."""
    mixing, table_VC = actor.language.mixing, None
    if draws.mixes and mixing.uses_table:
        table_VC = actor.table_VC
        if table_VC is None:  # of the right shape and place; its entries do not matter here
            table_VC = jax.device_put(
                np.zeros((actor.config.vocab_size, mixing.k), np.int32),
                mesh.replicated(actor.sharding.mesh),  # type: ignore[arg-type]
            )
    return engine.compile_ahead(
        actor.params,
        actor.config,
        samples=draws.samples,
        max_new_tokens=draws.max_new_tokens,
        temperature=draws.temperature,
        top_p=draws.top_p,
        top_k=draws.top_k,
        mixing=mixing if draws.mixes else None,
        table_VC=table_VC,
        stop_ids=actor.language.stop_ids,
        slots=own_slots(settings),
        chunk=settings.rollout.chunk,
        max_prompt_tokens=settings.data.max_prompt_tokens,
        sharding=actor.sharding,
    )


def failures(trajectories: Trajectories, samples: int, ids: Sequence[str]) -> str | None:
    """A sentence about the responses that ended in logits that are no finite numbers; None without any."""
    failed = np.flatnonzero(trajectories.failed_B).tolist()
    found = sorted({ids[index // samples] for index in failed})
    if not found:
        return None
    named = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return f"{len(failed)} responses ended in logits that are not finite, to the problems {named}"


def _in_words(stats: engine.Stats) -> str:
    rate = console.format_rate(stats.tokens / max(stats.decode_s + stats.prefill_s, 1e-9), "tokens")
    return f"{console.format_count(stats.tokens)} tokens, {rate}, {100 * stats.occupancy:.0f} % of slots busy"


def evaluate_set(
    actor: Actor, held_out: ProblemSet, settings: Settings, grader: Grader, *, label: str
) -> Evaluation:
    """A model's figures on `data.eval` (docs/evaluation.md); each host writes a share of the problems."""
    name, samples, here = set_name(settings.data.eval), settings.eval.samples, distributed.place()
    share = here.share(len(held_out.problems))
    with console.Progress(
        label, len(share) * samples, "sequences", keep=False, enabled=here.primary
    ) as progress:
        answered = answer_problems(actor, held_out, share, settings, grader, name=name, progress=progress)
    graded = answered.graded(settings.reward.kind)
    figures = benchmark.training_figures(graded, settings.eval.largest_k)
    return Evaluation(answered.trajectories, answered.texts, graded.rewards_PN, figures)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Responses to some problems (P, n samples each) of a set, with their scores; of this host's share."""

    trajectories: Trajectories
    texts: list[str]
    rewards_PN: np.ndarray

    def graded(self, kind: str) -> benchmark.Graded:
        """What figures are made of, over all hosts; `kind` says where a response's answer stands.

        The problems come in the order of a run of one process. Every process has to call this.
        """
        shape = self.rewards_PN.shape
        written = self.trajectories
        fields = (
            self.rewards_PN.reshape(-1).tolist(),
            [final_answer(text, kind) for text in self.texts],
            written.lengths_B.tolist(),
            written.stopped_B.tolist(),
        )
        responses = list(zip(*fields, strict=True))
        own = [responses[start : start + shape[1]] for start in range(0, len(responses), shape[1])]
        rows = distributed.merge("evaluation", own)
        rewards_PN, finals_PN, lengths_PN, stopped_PN = (
            [[response[field] for response in row] for row in rows] for field in range(4)
        )
        return benchmark.Graded(
            np.asarray(rewards_PN, np.float32),
            [[vote(final) for final in finals] for finals in finals_PN],
            np.asarray(lengths_PN),
            np.asarray(stopped_PN),
        )


def answer_problems(
    actor: Actor,
    held_out: ProblemSet,
    problems: Sequence[int],
    settings: Settings,
    grader: Grader,
    *,
    name: str,
    progress: console.Progress,
    done_before: int = 0,
) -> Answered:
    """Writes and grades `eval.samples` responses to the problems of these numbers of the set `name`.

    Args:
      done_before: sequences that the line `progress` already counts.
    """
    samples, draws = settings.eval.samples, evaluation_draws(settings)
    if not problems:  # a share of fewer problems than hosts
        nothing = Trajectories.empty(0, draws.max_new_tokens, 1)
        return Answered(nothing, [], np.zeros((0, samples), np.float32))
    trajectories = write_responses(
        actor,
        [held_out.prompts[index] for index in problems],
        settings,
        label=name,
        stream=EVAL_STREAM,
        draws=draws,
        keys_B=evaluation_keys(settings.seed, name, problems, samples),
        progress=progress,
        done_before=done_before,
    )
    sentence = failures(trajectories, samples, [held_out.problems[index].id for index in problems])
    if sentence:
        print(f"warning: {name}: {sentence}; they are graded as they stand", flush=True)
    texts = response_texts(actor.language, trajectories)
    golds = [held_out.problems[index].answer for index in problems for _ in range(samples)]
    rewards = np.asarray(grader.score(texts, golds, settings.reward.kind), np.float32)
    return Answered(trajectories, texts, rewards.reshape(len(problems), samples))


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
    chosen = places[np.searchsorted(numbers, sample[np.isin(sample, numbers)])]
    seen = []
    if len(chosen):
        cosines = _padded_cosines(actor, trajectories, chosen)
        anchors = _at(trajectories.mixtures, chosen).weights[:, 0]
        seen = np.stack([cosines, anchors], axis=1).tolist()
    of_all = [pair for pairs in distributed.exchange("cosines", seen) for pair in pairs]
    cosines, anchors = np.asarray(of_all, np.float32).T
    figures = {f"rollout/mix_cosine_{name}": x for name, x in geometry.cosine_figures(cosines).items()}
    return {**figures, "rollout/mix_anchor_weight": float(anchors.mean())}


def mixed_cosines(actor: Actor, trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """(places [M, 2], cosines [M]): each mixed input's sequence and position, and how near to its anchor."""
    places = np.argwhere(trajectories.mixed_BT)
    parts = [places[start : start + COSINE_SAMPLE] for start in range(0, len(places), COSINE_SAMPLE)]
    found = [_padded_cosines(actor, trajectories, part) for part in parts]
    return places, np.concatenate([np.zeros(0, np.float32), *found])


def _padded_cosines(actor: Actor, trajectories: Trajectories, places_N2: np.ndarray) -> np.ndarray:
    """Cosine of the inputs at these (sequence, position) to their anchors, float32 [N ≤ COSINE_SAMPLE]."""
    count = len(places_N2)
    padded = np.concatenate([places_N2, np.repeat(places_N2[-1:], COSINE_SAMPLE - count, axis=0)])
    mixture = _at(trajectories.mixtures, padded)
    return np.asarray(_cosine_to_anchor(actor.params["embed"]["embedding"], mixture))[:count]


def _at(mixtures: Mixture, places_N2: np.ndarray) -> Mixture:
    rows_N, times_N = places_N2.T
    return jax.tree.map(lambda leaf: leaf[rows_N, times_N], mixtures)


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
