"""The metrics of a data set, the paper's numbers, final answers and votes."""

import numpy as np
import pytest

from ngrpo_jax.evaluation.answers import final_answer, vote
from ngrpo_jax.evaluation.statistics import estimates, paper, passk

REWARDS = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], np.float32)
ANSWERS = [["4", "5", "4", None], ["1", "1", "2", None], ["7"] * 4, [None, None, None, "9"]]


def _graded(rewards=REWARDS, answers=ANSWERS):
    lengths = np.arange(16).reshape(4, 4)
    return estimates.GradedResponses(rewards, answers, lengths, lengths % 4 > 0)


def test_metrics_by_hand():
    found = estimates.estimate_metrics(_graded(), (1, 4))
    assert found["mean_at_n"].value == pytest.approx(7 / 16)
    assert found["pass_at_1"].value == pytest.approx(7 / 16)
    assert found["pass_at_4"].value == pytest.approx(3 / 4)
    assert found["best_at_4"].value == passk.best_at_k_bootstrap(REWARDS, 4)
    assert found["maj_at_n"].value == pytest.approx(3 / 4)  # 4, wrong, 7, 9
    assert found["truncated"].value == pytest.approx(1 / 4)
    assert found["no_answer"].value == pytest.approx(5 / 16)
    assert (found["length_mean"].value, found["length_max"].value) == (7.5, 15)
    for name in ("mean_at_n", "pass_at_4", "maj_at_n"):
        assert found[name].low <= found[name].value <= found[name].high
    with pytest.raises(ValueError, match="k is 5 and n is 4"):
        estimates.estimate_metrics(_graded(), (5,))


def test_graded_rewards_keep_their_mean_and_count_as_right_above_a_half():
    found = estimates.estimate_metrics(_graded(REWARDS * 0.6 + 0.2), (1,))
    assert found["mean_at_n"].value == pytest.approx(0.2 + 0.6 * 7 / 16)
    assert found["pass_at_1"].value == pytest.approx(7 / 16)


def test_without_answers_there_is_no_majority():
    found = estimates.estimate_metrics(_graded(answers=[[None] * 4] * 4), (1,))
    assert "maj_at_n" not in found and found["no_answer"].value == 1.0
    assert estimates.training_estimates(_graded(answers=[[None] * 4] * 4), 2)["maj_at_n"].value == 0.0


def test_a_training_run_records_values_under_names_without_a_k():
    found, every = estimates.training_estimates(_graded(), 4), estimates.estimate_metrics(_graded(), (1, 4))
    assert found["pass_at_k"] == every["pass_at_4"]
    same = ("mean_at_n", "maj_at_n", "truncated", "length_mean")
    assert {name: found[name] for name in same} == {name: every[name] for name in same}
    assert set(found) == {*same, "pass_at_k"}


def test_appendix_e_by_hand():
    metrics = estimates.cosine_metrics(np.array([1.0, 0.9, 0.96, 0.94]))
    assert metrics == {"mean": pytest.approx(0.95), "min": 0.9, "below_095": 0.5}


def test_the_average_is_over_sets_and_of_what_all_have():
    one, two = (
        estimates.estimate_metrics(_graded(), (1, 4)),
        estimates.estimate_metrics(_graded(1 - REWARDS), (1,)),
    )
    mean = estimates.average([one, two])
    assert mean["mean_at_n"].value == pytest.approx(0.5) and "pass_at_4" not in mean


def test_the_papers_averages_are_those_of_its_sets():
    for backbone, methods in paper.TABLE.items():
        for name, cells in methods.items():
            if not set(paper.SETS) <= set(cells):
                continue
            for column in range(3):
                mean = np.mean([cells[one][column] for one in paper.SETS])
                assert mean == pytest.approx(cells["average"][column], abs=0.0101), (backbone, name, column)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "N-GRPO"),
        ({"trained": False}, "base"),
        ({"trained": False, "mixes": True}, "mixing at inference"),
        ({"trained": False, "mixes": True, "strategy": "soft"}, "Soft Thinking"),
        ({"rate": 0.0}, "GRPO"),
        ({"strategy": "none"}, "GRPO"),
        ({"rate": 0.0, "algorithm": "gspo"}, "GSPO"),
        ({"algorithm": "gspo"}, "N-GSPO"),
        ({"rate": 1.0}, "N-GRPO without rate"),
        ({"rate": 0.15}, "N-GRPO, rate 0.15"),
        ({"metric": "l1"}, "N-GRPO, l1"),
        ({"strategy": "noise"}, "STHT"),
        ({"strategy": "gumbel"}, "Gumbel"),
        ({"algorithm": "gspo", "rate": 0.3}, None),
        (paper.NEIGHBOR, "N-GRPO"),
        ({"k": 2}, None),
        ({"weights": "probs"}, None),
        ({"keep_out": "7"}, None),
        ({"k": 2, "trained": False}, "base"),
        ({"k": 2, "rate": 0.0}, "GRPO"),
        ({"k": 10, "strategy": "gumbel"}, "Gumbel"),
        ({"k": 2, "trained": False, "mixes": True}, None),
    ],
)
def test_methods_by_the_papers_names(changes, name):
    facts = {"trained": True, "strategy": "neighbor", "rate": 0.1, "metric": "cosine"}
    facts |= {"algorithm": "grpo", "mixes": False}
    found = paper.method(**{**facts, **changes})
    assert found == name
    assert name is None or any(name in methods for methods in paper.TABLE.values())


def test_the_backbone_is_read_off_a_path():
    assert paper.backbone("/models/deepseek-r1-distill-qwen-1.5b") == "DeepSeek-R1-Distill-Qwen-1.5B"
    assert paper.backbone("HuggingFaceTB/SmolLM2-135M") is None


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        (r"<think>\boxed{1}</think> so \boxed{2}", "math", "2"),
        (r"it is 2", "math", None),
        ("so\nAnswer: B", "choice", "B"),
        ("so B", "choice", None),
        (r"it is 1,200.50.", "module:reward", "1,200.50"),
        ("5 of 8,000, so", "module:reward", "8,000"),
        (r"\boxed{7} of 8", "module:reward", "7"),
        ("none", "module:reward", None),
    ],
)
def test_final_answers(response, kind, answer):
    assert final_answer(response, kind) == answer


def test_answers_that_mean_the_same_are_one_vote():
    assert vote("1/2") == vote("0.5") == vote(r"\frac{1}{2}") == vote(r"\dfrac12")
    assert vote(" x + 1") == vote("x+1") != vote("x+2")
    assert vote("1200") == vote("1,200")
    assert vote(None) is vote("  ") is None
