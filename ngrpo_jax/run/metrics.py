"""A training step in numbers: its row of metrics.jsonl, and the responses of it that samples.jsonl shows.

Owns the names of these figures, and how those of several hosts become one. Must not know the order of a step,
nor decide anything by what it measures. Cosines of mixed inputs are taken here for evaluations as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ngrpo_jax.evaluation.cosines import COSINE_SAMPLE, cosines_at, mixtures_at
from ngrpo_jax.evaluation.statistics import geometry
from ngrpo_jax.preflight import memory
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.run.state import Run
from ngrpo_jax.runtime import distributed, hardware
from ngrpo_jax.setup.learner import old_logprobs
from ngrpo_jax.setup.policy import Policy, sequence_numbers
from ngrpo_jax.setup.tokenizer_info import TokenizerInfo
from ngrpo_jax.tasks import prompts
from ngrpo_jax.tasks.datasets import Problem
from ngrpo_jax.tasks.rewards import Counts

SAMPLES_A_STEP = 2  # responses of each step that go to samples.jsonl


class Outcome(NamedTuple):
    """A rollout in numbers, over all hosts, in the order of a run of one process."""

    rewards_PG: np.ndarray
    lengths_B: np.ndarray
    stopped_B: np.ndarray
    mixed_B: np.ndarray  # mixed inputs of each response


def gather_outcome(trajectories: Trajectories, rewards_PG: np.ndarray) -> Outcome:
    """The outcome of all hosts from this one's graded responses. Every process has to call this."""
    mixed_B = trajectories.mixed_BT.sum(axis=1)
    own_B4 = np.stack(
        [rewards_PG.reshape(-1), trajectories.lengths_B, trajectories.stopped_B, mixed_B], axis=1
    )
    own = own_B4.astype(np.float64).reshape(*rewards_PG.shape, 4).tolist()
    all_PG4 = np.asarray(distributed.allgather_items("rollout", own))
    return Outcome(
        all_PG4[..., 0].astype(np.float32),
        all_PG4[..., 1].astype(np.int32).reshape(-1),
        all_PG4[..., 2].astype(bool).reshape(-1),
        all_PG4[..., 3].astype(np.int32).reshape(-1),
    )


def step_row(
    run: Run,
    prompts: Sequence[Sequence[int]],
    trajectories: Trajectories,
    outcome: Outcome,
    graded: Counts,
    figures: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, float]:
    """A step's row of metrics.jsonl. Every process has to call this.

    Args:
      prompts, trajectories, graded: this host's.
      outcome: that of all hosts.
      figures: of the rollout, the update and the table, as they are.
      seconds: of each phase, by name.
    """
    tokens, whole = int(outcome.lengths_B.sum()), sum(seconds.values())
    return {
        **reward_figures(outcome.rewards_PG, graded),
        **figures,
        **{f"time/{name}": value for name, value in seconds.items()},
        "time/step": whole,
        "speed/rollout_tokens": tokens / seconds["rollout"],
        "speed/reward_tokens": tokens / seconds["reward"],
        "speed/step_tokens": tokens / whole,
        **learner_speed(run, prompts, trajectories, seconds, jax.local_devices()[0]),
    }


def reward_figures(rewards_PG: np.ndarray, graded: Counts) -> dict[str, float]:
    """Mean and deviation of the rewards, the share of groups in which all are alike, and how grading went.

    Args:
      rewards_PG: of all hosts.
      graded: what this host's grader did for them. Every process has to call this.
    """
    own = [graded.graded, graded.seconds, graded.timeouts + graded.failures]
    verdicts, took, without = zip(*distributed.allgather("grading", own), strict=True)
    return {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std()),
        "reward/no_verdict": sum(without) / sum(verdicts),
        "speed/verdicts": sum(verdicts) / max(took),
        "groups/zero_variance": float((rewards_PG.max(axis=1) == rewards_PG.min(axis=1)).mean()),
    }


def rollout_figures(policy: Policy, trajectories: Trajectories, outcome: Outcome) -> dict[str, float]:
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
        figures |= _mixing_figures(policy, trajectories, outcome)
    return figures


def _mixing_figures(policy: Policy, trajectories: Trajectories, outcome: Outcome) -> dict[str, float]:
    """Cosine to the anchor and its weight, over COSINE_SAMPLE of all hosts' mixed inputs, spread evenly.

    Each host looks at those of the sample that it wrote, so that hosts do not change which they are.
    """
    prompts, samples = outcome.rewards_PG.shape
    own = len(distributed.process().share(prompts))
    starts_B = (np.cumsum(outcome.mixed_B) - outcome.mixed_B)[sequence_numbers(own, samples)]
    places = np.argwhere(trajectories.mixed_BT)
    before = np.concatenate([[0], np.cumsum(trajectories.mixed_BT.sum(axis=1))])
    numbers = starts_B[places[:, 0]] + np.arange(len(places)) - before[places[:, 0]]  # increasing
    sample = np.linspace(0, int(outcome.mixed_B.sum()) - 1, COSINE_SAMPLE).astype(int)
    chosen = places[np.searchsorted(numbers, sample[np.isin(sample, numbers)])]
    seen = []
    if len(chosen):
        cosines = cosines_at(policy, trajectories, chosen)
        anchors = mixtures_at(trajectories, chosen).weights[:, 0]
        seen = np.stack([cosines, anchors], axis=1).tolist()
    of_all = [pair for pairs in distributed.allgather("cosines", seen) for pair in pairs]
    cosines, anchors = np.asarray(of_all, np.float32).T
    figures = {f"rollout/mix_cosine_{name}": x for name, x in geometry.cosine_metrics(cosines).items()}
    return {**figures, "rollout/mix_anchor_weight": float(anchors.mean())}


def learner_speed(
    run: Run,
    prompts: Sequence[Sequence[int]],
    trajectories: Trajectories,
    seconds: dict[str, float],
    device: jax.Device,
) -> dict[str, float]:
    """Tokens a second of scoring and update, the latter's model FLOP utilisation, and peak memory.

    Tokens are those of prompts and responses of all hosts, each prompt once a response, however many models
    score them; where none has to, that figure is left out. The utilisation counts the products of an update
    (of three forward passes), over the peak of the devices' bfloat16 arithmetic; it is left out where
    that is unknown. Memory is that of the fullest of the hosts' first devices. Every process calls this.
    """
    settings, config = run.settings, run.model_spec.config
    lengths = [
        (len(prompt), int(trajectories.lengths_B[i * settings.rollout.group + j]))
        for i, prompt in enumerate(prompts)
        for j in range(settings.rollout.group)
    ]
    forward = sum(memory.forward_flops(config, *length) for length in lengths)
    own = [sum(prompt + response for prompt, response in lengths), forward, hardware.peak_memory(device)]
    of_tokens, of_work, of_memory = zip(*distributed.allgather("speed", own), strict=True)
    figures = {"speed/update_tokens": sum(of_tokens) / seconds["update"]}
    if run.reference is not None or old_logprobs(settings) == "learner":
        figures["speed/logprob_tokens"] = sum(of_tokens) / seconds["logprobs"]
    peak = hardware.peak_flops(device)
    if peak is not None:
        figures["speed/update_mfu"] = 3 * sum(of_work) / seconds["update"] / (peak * run.mesh.size)
    held = [memory for memory in of_memory if memory is not None]
    return {**figures, "memory/peak": float(max(held))} if held else figures


def sample_rows(
    tokenizer_info: TokenizerInfo,
    problems: Sequence[Problem],
    trajectories: Trajectories,
    rewards_PG: np.ndarray,
    *,
    step: int,
) -> list[dict[str, Any]]:
    """A step's rows of samples.jsonl: the first response to each of its first SAMPLES_A_STEP problems."""
    group = rewards_PG.shape[1]
    return [
        {
            "step": step,
            **sample_row(tokenizer_info, problem, trajectories, number * group, rewards_PG[number, 0]),
        }
        for number, problem in enumerate(problems[:SAMPLES_A_STEP])
    ]


def sample_row(
    tokenizer_info: TokenizerInfo, problem: Problem, trajectories: Trajectories, index: int, reward: float
) -> dict[str, Any]:
    """One response as a JSON row for samples.jsonl: text, verdict, and where its inputs were mixed."""
    tokens = trajectories.response(index)
    mixed = trajectories.mixed_BT[index, : len(tokens)]
    text, spans = prompts.mixed_spans(tokenizer_info.tokenizer, tokens, mixed)
    return {
        "id": problem.id,
        "problem": problem.problem,
        "answer": problem.answer,
        "response": text,
        "reward": float(reward),
        "mixed": spans,
        "tokens": len(tokens),
        "stopped": bool(trajectories.stopped_B[index]),
    }
