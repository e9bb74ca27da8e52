"""Parts of a training step: which problems each host takes, and the metrics of a rollout."""

import types

import jax
import numpy as np
import pytest

from ngrpo_jax.algo.mixture import Mixture
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.model.flops import forward_flops
from ngrpo_jax.rollout.trajectory import Trajectories
from ngrpo_jax.run import metrics, samples, step
from ngrpo_jax.run.step import problems_of
from ngrpo_jax.runtime import distributed, hardware
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.tasks.datasets import Problem
from ngrpo_jax.tasks.rewards import Counts

CONFIG = ModelConfig("qwen2", 32, 16, 32, 2, 4, 2, 4)
DEVICES = np.array(jax.devices()[:4])
PROBLEMS = ProblemSet(
    [Problem(str(i), f"{i}?", str(i)) for i in range(10)], [[i] * (i + 1) for i in range(10)]
)


def _run(**changes):
    """As much of a run as these functions read."""
    own = types.SimpleNamespace
    settings = own(seed=3, rollout=own(prompts=6, group=2), objective=own(old_logprobs="sampler"))
    parts = {
        "settings": settings,
        "training": PROBLEMS,
        "reference": None,
        "mesh": own(size=4, devices=DEVICES),
    }
    return own(**(parts | {"model_spec": own(config=CONFIG)} | changes))


def _rollout(run, lengths_B):
    """Responses of these lengths to the first of the problems."""
    written = Trajectories.empty(len(lengths_B), max(lengths_B), 1)
    written = written._replace(lengths_B=np.array(lengths_B, np.int32))
    batch = run.training.take(range(len(lengths_B) // 2))
    return metrics.Rollout(batch, written, np.zeros((len(batch.problems), 2), np.float32), Counts())


def test_hosts_share_the_problems_that_one_process_takes(monkeypatch):
    whole = problems_of(_run(), 2)
    assert len(whole.problems) == 6 and [prompt[0] for prompt in whole.prompts] == [
        int(p.id) for p in whole.problems
    ]
    assert whole.problems != problems_of(_run(), 1).problems
    parts = []
    for host in range(3):
        monkeypatch.setattr(distributed, "process", lambda host=host: distributed.Process(host, 3))
        parts.append(problems_of(_run(), 2).problems)
    assert [parts[i % 3][i // 3] for i in range(6)] == whole.problems


def test_metrics_of_rewards_and_their_grading():
    graded = Counts(graded=8, plain=4, no_box=1, timeouts=1, failures=1, seconds=2.0)
    found = metrics.reward_metrics(np.array([[1.0, 0.0], [1.0, 1.0]], np.float32), graded)
    assert found["reward/mean"] == 0.75 and found["groups/zero_variance"] == 0.5
    assert found["speed/verdicts"] == 4.0 and found["reward/no_verdict"] == 0.25
    assert found["reward/plain"] == 0.5 and found["reward/no_box"] == 0.125


def test_metrics_of_devices_count_a_prompt_once_for_each_response(monkeypatch):
    run, seconds = _run(), {"update": 2.0, "logprobs": 4.0}
    rollout = _rollout(run, [3, 5, 2, 4])  # to a prompt of one token and one of two
    monkeypatch.setattr(hardware, "peak_memory", lambda device: 12)
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e6)
    found = metrics.device_metrics(run, rollout, seconds)
    work = sum(forward_flops(CONFIG, *lengths) for lengths in [(1, 3), (1, 5), (2, 2), (2, 4)])
    assert found == {
        "speed/update_tokens": (1 + 3 + 1 + 5 + 2 + 2 + 2 + 4) / 2.0,
        "speed/update_mfu": pytest.approx(3 * work / 2.0 / (1e6 * 4)),
        "memory/peak": 12.0,
    }
    found = metrics.device_metrics(_run(reference={}), rollout, seconds)
    assert found["speed/logprob_tokens"] == 20 / 4.0


def test_what_the_system_does_not_tell_is_left_out(monkeypatch):
    run = _run()
    monkeypatch.setattr(hardware, "peak_memory", lambda device: None)
    monkeypatch.setattr(hardware, "peak_flops", lambda device: None)
    found = metrics.device_metrics(run, _rollout(run, [3, 5]), {"update": 2.0, "logprobs": 4.0})
    assert found.keys() == {"speed/update_tokens"}


def _sampled(lengths_B, rewards_PG, monkeypatch):
    """(policy, rollout) of responses whose first two tokens are mixed, with cosine 0.5 + position / 100."""
    run = _run()
    rollout = _rollout(run, lengths_B)
    shape = (len(lengths_B), max(lengths_B))
    written = Trajectories.empty(*shape, 2)._replace(lengths_B=np.array(lengths_B, np.int32))
    tokens_BT = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % 26
    weights_BTC = np.broadcast_to(np.array([0.75, 0.25], np.float32), (*shape, 2))
    mixtures = Mixture(np.stack([tokens_BT, (tokens_BT + 1) % 26], axis=-1), weights_BTC)
    mixed_BT = np.broadcast_to(np.arange(shape[1]) < 2, shape)
    written = written._replace(tokens_BT=tokens_BT, mixed_BT=mixed_BT, mixtures=mixtures)
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "".join(chr(97 + int(i)) for i in ids))
    policy = types.SimpleNamespace(tokenizer_info=types.SimpleNamespace(tokenizer=tokenizer))

    def cosines(policy, part):
        positions = np.argwhere(part.mixed_BT)
        return positions, 0.5 + positions[:, 1] / 100

    monkeypatch.setattr(samples, "mixed_cosines", cosines)
    return policy, rollout._replace(trajectories=written, rewards_PG=np.array(rewards_PG, np.float32))


def test_sample_rows_are_whole_groups_with_their_mixtures(monkeypatch):
    policy, rollout = _sampled([2, 3, 3, 3, 3, 3], [[1, 1], [1, 0], [0, 0]], monkeypatch)
    rows = samples.sample_rows(policy, rollout, 7)
    assert [(row["id"], row["sample"], row["reward"]) for row in rows] == [
        ("1", 1, 1.0),
        ("1", 2, 0.0),
        ("2", 1, 0.0),
        ("2", 2, 0.0),
    ]  # the group whose rewards differ, then that of least reward
    first = rows[0]
    assert (first["step"], first["response"], first["tokens"]) == (7, "ghi", 3)
    assert first["mixed"] == [[0, 1], [1, 2]]
    assert first["mixtures"] == [[0.5, "g", 0.75, "h", 0.25], [0.51, "h", 0.75, "i", 0.25]]


def test_sample_rows_stay_within_their_bytes(monkeypatch):
    policy, rollout = _sampled([400, 900, 3, 3], [[1, 0], [0, 0]], monkeypatch)
    whole = samples.sample_rows(policy, rollout, 1)
    assert [len(row["response"]) for row in whole] == [400, 900, 3, 3]
    monkeypatch.setattr(samples, "STEP_BYTES", 1000)
    rows = samples.sample_rows(policy, rollout, 1)
    assert [row["id"] for row in rows] == ["0", "0"]  # no room for the second group
    assert [len(row["response"]) for row in rows] == [400, 598] and rows[1]["cut"] == 302
    assert all(row["mixtures"] == [] and len(row["mixed"]) == 2 for row in rows)


def test_a_response_that_is_not_finite_is_kept_for_inspection(monkeypatch):
    policy, rollout = _sampled([2, 2, 2, 2, 2, 2], [[1, 0], [0, 0], [1, 1]], monkeypatch)
    nonfinite_B = np.array([False, False, True, False, False, True])
    rollout = rollout._replace(trajectories=rollout.trajectories._replace(nonfinite_B=nonfinite_B))
    rows = samples.sample_rows(policy, rollout, 1)
    assert [(row["id"], row["sample"]) for row in rows if row.get("nonfinite")] == [("1", 1), ("2", 2)]
    assert [row["id"] for row in rows] == ["0", "0", "1", "1", "2"]


def test_largest_bound_is_the_largest_that_fits():
    for sizes, total in (([5, 9, 2], 12), ([5, 9, 2], 100), ([], 5), ([4, 4], 0), ([7, 7, 1], 13)):
        bound = samples.largest_bound(sizes, total)
        fits = [b for b in range(12) if sum(min(size, b) for size in sizes) <= total]
        assert min(bound, max(sizes, default=0)) == min(max(fits), max(sizes, default=0))


def test_cosines_are_of_mixed_inputs_spread_over_all_hosts(monkeypatch):
    """As many as one process would choose, and the same, however many hosts wrote them."""
    monkeypatch.setattr(metrics, "COSINE_SAMPLE", 4)
    lengths_B = np.array([5, 1, 4, 6], np.int32)  # responses to two problems, of a host each
    mixed_BT = np.arange(6) < np.array([3, 0, 2, 6])[:, None]
    weights_BTC = (np.arange(24.0).reshape(4, 6) / 24)[..., None]

    def trajectories(rows):
        part = Trajectories.empty(len(rows), 6, 1)._replace(
            lengths_B=lengths_B[rows], mixed_BT=mixed_BT[rows]
        )
        return part._replace(mixtures=part.mixtures._replace(weights=weights_BTC[rows].astype(np.float32)))

    monkeypatch.setattr(
        metrics, "cosines_at", lambda policy, written, at: written.mixtures.weights[tuple(at.T)][:, 0]
    )
    responses = metrics.Responses(
        np.zeros((2, 2)), lengths_B.reshape(2, 2), np.ones((2, 2), bool), mixed_BT.sum(axis=1).reshape(2, 2)
    )
    rollout = metrics.Rollout(None, trajectories([0, 1, 2, 3]), responses.rewards_PG, Counts())
    alone = metrics.response_metrics(None, rollout, responses)
    chosen = weights_BTC[mixed_BT][[0, 3, 6, 10], 0]
    assert alone["rollout/mix_cosine_mean"] == pytest.approx(chosen.mean())
    assert alone["rollout/mix_cosine_min"] == pytest.approx(chosen.min())
    given = []
    for host in range(2):
        monkeypatch.setattr(distributed, "process", lambda host=host: distributed.Process(host, 2))
        monkeypatch.setattr(
            distributed, "allgather", lambda name, value: given.append(value) or [[[0.0, 0.0]]]
        )
        metrics.response_metrics(
            None, rollout._replace(trajectories=trajectories([2 * host, 2 * host + 1])), responses
        )
    assert sorted(cosine for pairs in given for cosine, _ in pairs) == pytest.approx(sorted(chosen))


def test_only_the_first_step_of_a_process_says_that_it_compiles(monkeypatch):
    labels = []
    progress = step.console.Progress
    monkeypatch.setattr(
        step.console, "Progress", lambda label, **rest: labels.append(label) or progress(label, **rest)
    )
    monkeypatch.setattr(step, "_to_compile", {"logprobs", "update"})
    for _ in range(2):
        for phase in ("reward", "logprobs", "update"):
            with step._timed({}, phase):
                pass
    note = " (the first time compiles)"
    once = ["grading", "log-probabilities", "update"]
    assert labels == [once[0], *(label + note for label in once[1:]), *once]
