"""A training step in numbers: its row of metrics.jsonl.

Owns the names of these metrics but for those of the learner and the neighbour table, and how the numbers of
several hosts become one. Must not know the order of a step, nor decide anything by what it measures.
"""

from typing import NamedTuple

import numpy as np

from ngrpo_jax.evaluation.cosines import COSINE_SAMPLE, cosines_at, mixtures_at
from ngrpo_jax.evaluation.statistics import estimates
from ngrpo_jax.model.flops import forward_flops
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.run.state import Run
from ngrpo_jax.runtime import distributed, hardware, mesh
from ngrpo_jax.setup.learner import old_logprobs
from ngrpo_jax.setup.policy import Policy, sequence_numbers
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.tasks.rewards import Counts


class Rollout(NamedTuple):
    """This host's part of a step's rollout: G graded responses to each of P problems, prompt-major."""

    batch: ProblemSet
    trajectories: Trajectories
    rewards_PG: np.ndarray  # float32
    grading: Counts  # what the grader did for them


class Responses(NamedTuple):
    """What metrics read of each response of a step, of all hosts, in the order of a run of one process."""

    rewards_PG: np.ndarray
    lengths_PG: np.ndarray
    stopped_PG: np.ndarray
    mixed_PG: np.ndarray  # mixed inputs of a response


def gather_responses(rollout: Rollout) -> Responses:
    """The responses of all hosts. Every process has to call this."""
    rewards_PG, written = rollout.rewards_PG, rollout.trajectories
    columns = (rewards_PG, written.lengths_B, written.stopped_B, written.mixed_BT.sum(axis=1))
    by_problem = zip(*(column.reshape(rewards_PG.shape).tolist() for column in columns), strict=True)
    gathered = zip(*distributed.allgather_items("rollout", list(by_problem)), strict=True)
    return Responses(*(np.array(x, own.dtype) for x, own in zip(gathered, columns, strict=True)))


def step_row(
    run: Run, rollout: Rollout, responses: Responses, metrics: dict[str, float], seconds: dict[str, float]
) -> dict[str, float]:
    """A step's row of metrics.jsonl. Every process has to call this.

    Args:
      metrics: those of the rollout, the update and the table, taken over as they are.
      seconds: of each phase, by name.
    """
    tokens, whole = int(responses.lengths_PG.sum()), sum(seconds.values())
    return {
        **reward_metrics(responses.rewards_PG, rollout.grading),
        **metrics,
        **{f"time/{name}": value for name, value in seconds.items()},
        "time/step": whole,
        "speed/rollout_tokens": tokens / seconds["rollout"],
        "speed/reward_tokens": tokens / seconds["reward"],
        "speed/step_tokens": tokens / whole,
        **device_metrics(run, rollout, seconds),
    }


def reward_metrics(rewards_PG: np.ndarray, grading: Counts) -> dict[str, float]:
    """Mean and deviation of the rewards, the share of groups with equal rewards, the ways of verdicts.

    Every process has to call this.

    Args:
      rewards_PG: of all hosts.
      grading: of this host's grader.
    """
    own = [grading.graded, grading.seconds, *grading.by_way.values()]
    verdicts, took, *ways = zip(*distributed.allgather("grading", own), strict=True)
    shares = [sum(counts) / sum(verdicts) for counts in ways]
    return {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std()),
        **{f"reward/{way}": share for way, share in zip(grading.by_way, shares, strict=True)},
        "speed/verdicts": sum(verdicts) / max(took),
        "groups/zero_variance": float((rewards_PG.max(axis=1) == rewards_PG.min(axis=1)).mean()),
    }


def response_metrics(policy: Policy, rollout: Rollout, responses: Responses) -> dict[str, float]:
    """Lengths, truncation and mixing of the responses. Every process has to call this."""
    metrics = {
        "rollout/length_mean": float(responses.lengths_PG.mean()),
        "rollout/length_max": float(responses.lengths_PG.max()),
        "rollout/truncated": float(1.0 - responses.stopped_PG.mean()),
        "rollout/mixed_fraction": float(responses.mixed_PG.sum() / responses.lengths_PG.sum()),
    }
    if responses.mixed_PG.any():
        metrics |= _mixing_metrics(policy, rollout.trajectories, responses)
    return metrics


def _mixing_metrics(policy: Policy, trajectories: Trajectories, responses: Responses) -> dict[str, float]:
    """Cosine to the anchor (Appendix E) and its weight, over COSINE_SAMPLE mixed inputs, evenly spread.

    The sample is one of all hosts' mixed inputs, in the order of a run of one process, so that the number of
    hosts does not change it; each host computes those that it wrote.
    """
    prompts, samples = responses.rewards_PG.shape
    own = len(distributed.process().share(prompts))
    mixed_B = responses.mixed_PG.reshape(-1)
    first_B = (np.cumsum(mixed_B) - mixed_B)[sequence_numbers(own, samples)]
    positions = np.argwhere(trajectories.mixed_BT)
    before = np.concatenate([[0], np.cumsum(trajectories.mixed_BT.sum(axis=1))])
    numbers = first_B[positions[:, 0]] + np.arange(len(positions)) - before[positions[:, 0]]  # increasing
    sample = np.linspace(0, int(mixed_B.sum()) - 1, COSINE_SAMPLE).astype(int)
    chosen = positions[np.searchsorted(numbers, sample[np.isin(sample, numbers)])]
    found = []
    if len(chosen):
        cosines = cosines_at(policy, trajectories, chosen)
        anchors = mixtures_at(trajectories, chosen).weights[:, 0]
        found = np.stack([cosines, anchors], axis=1).tolist()
    of_all = [pair for pairs in distributed.allgather("cosines", found) for pair in pairs]
    cosines, anchors = np.asarray(of_all, np.float32).T
    metrics = {f"rollout/mix_cosine_{name}": x for name, x in estimates.cosine_metrics(cosines).items()}
    return {**metrics, "rollout/mix_anchor_weight": float(anchors.mean())}


def device_metrics(run: Run, rollout: Rollout, seconds: dict[str, float]) -> dict[str, float]:
    """The learner's tokens a second, its model FLOP utilisation, and peak memory.

    Every process has to call this. Tokens are those of prompts and responses of all hosts, a prompt counted
    once for each of its responses, however many models score them; where none has to, that metric is left
    out. The utilisation counts the products of an update (three forward passes, under adapters two), over the
    peak of the devices' bfloat16 arithmetic; it is left out where that is unknown. Memory is that of the
    fullest of the hosts' first devices.
    """
    settings, config = run.settings, run.model_spec.config
    device, group = mesh.device_of(run.mesh), settings.rollout.group
    prompts_B = [len(prompt) for prompt in rollout.batch.prompts for _ in range(group)]
    lengths = list(zip(prompts_B, rollout.trajectories.lengths_B.tolist(), strict=True))
    forward = sum(forward_flops(config, *length) for length in lengths)
    own = [sum(map(sum, lengths)), forward, hardware.peak_memory(device)]
    of_tokens, of_work, of_memory = zip(*distributed.allgather("speed", own), strict=True)
    metrics = {"speed/update_tokens": sum(of_tokens) / seconds["update"]}
    if run.reference is not None or old_logprobs(settings) == "learner":
        metrics["speed/logprob_tokens"] = sum(of_tokens) / seconds["logprobs"]
    peak = hardware.peak_flops(device)
    if peak is not None:
        passes = 3 if config.lora is None else 2
        metrics["speed/update_mfu"] = passes * sum(of_work) / seconds["update"] / (peak * run.mesh.size)
    held = [memory for memory in of_memory if memory is not None]
    return {**metrics, "memory/peak": float(max(held))} if held else metrics
