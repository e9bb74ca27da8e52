"""The paper's table beside ours: when it stands there, and what it says."""

import pathlib

import pytest

from ngrpo_jax.evaluation import tables
from ngrpo_jax.evaluation.generations import FORMAT, Generations

PAPERS = {"samples": 32, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_new_tokens": 8192}


def _evaluated(
    name, *, step=600, model="hub/DeepSeek-R1-Distill-Qwen-1.5B", rate=0.1, mixing=False, **changes
):
    sampling = PAPERS | changes
    depends = {f"eval.{leaf}": value for leaf, value in sampling.items()}
    depends |= {"eval.mixing": mixing, "reward.kind": "math"}
    trained = {"strategy": "neighbor", "rate": rate, "metric": "cosine", "algorithm": "grpo"}
    header = {"format": FORMAT, "set": name, "step": step, "model": model, "problems": 4, "too_long": 0}
    header |= {"pass_k": [16, 32], "trained": trained, "depends": depends}
    problems = [
        [
            {"reward": float(s < 16 * p), "final": str(s < 16 * p), "tokens": 10, "stopped": True}
            for s in range(sampling["samples"])
        ]
        for p in range(3)
    ]
    one = Generations(pathlib.Path(f"generations_{step}_{name}.jsonl"), header, problems)
    return one, one.metrics()


def _rows(text):
    return {line.split("  ")[0]: line for line in text.split("\n")}


def test_the_papers_rows_stand_beside_ours_and_the_same_method_is_marked():
    rows = _rows(tables.table_1([_evaluated(name) for name in ("aime25", "amc23", "math500")]))
    ours = "50.00 / 66.67 / 66.67"  # none, half and all of 32 right: of the second problem, 16 draws hold one
    assert rows["ours, step 600"].count(ours) == 4
    assert "23.33 / 46.48 / 50.28" in rows["paper, N-GRPO"] and "← this method" in rows["paper, N-GRPO"]
    assert "54.11 / 76.82 / 79.17" in rows["paper, N-GRPO"]
    assert "←" not in rows["paper, GRPO"] and "paper, GSPO" not in rows
    assert "AIME25" in next(iter(rows.values())) and "MATH500" in next(iter(rows.values()))


def test_a_set_alone_has_its_own_cells_and_no_average():
    rows = _rows(tables.table_1([_evaluated("gpqa_diamond", step=0)]))
    assert "32.23 / 85.51 / 90.79" in rows["paper, base"] and "← this method" in rows["paper, base"]
    assert "paper, STHT" not in rows and "average" not in next(iter(rows.values()))


def test_other_sets_than_the_papers_do_not_borrow_its_average():
    text = tables.table_1([_evaluated("aime25"), _evaluated("gsm8k")])
    assert "23.33" in text and "54.11" not in text


def test_a_method_of_which_only_the_average_is_known_is_shown_where_it_is_ours():
    sets = [_evaluated(name, rate=0.2) for name in ("aime25", "amc23", "math500")]
    assert "– / – / 77.65" in tables.table_1(sets)


@pytest.mark.parametrize(
    "changes", [{"samples": 64}, {"temperature": 0.7}, {"max_new_tokens": 4096}, {"model": "SmolLM2"}]
)
def test_where_the_setting_is_another_the_paper_is_silent(changes):
    assert "paper" not in tables.table_1([_evaluated("aime25", **changes)])


def test_an_unfinished_evaluation_says_so():
    one, metrics = _evaluated("aime25")
    assert "3 problems of 4, the rest is not evaluated yet" in tables.details(one, metrics, (16, 32))
