"""The study: problems and languages, arms, statistics, and that its page is what the records say."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.study import analysis, plan, report, search, spelling, store, strategies, tasks, trial
from benchmarks.study.arms import ARMS, CORE
from benchmarks.study.search import Family, Problem, Step
from ngrpo_jax.algo.mixture import Mixing, StepContext, cosine_to_anchor, neighbor_mixture
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.runtime import mesh

SEARCH_TASKS = [name for name, task in tasks.TASKS.items() if task.search is not None]


def test_what_is_played_is_solved_by_its_steps_and_among_all_solutions():
    family, rng = Family(3, 12, 30), random.Random(0)
    for _ in range(50):
        problem, steps = search.play(family, rng)
        assert search.solves(problem, steps)
        assert search.path(steps) in solutions(problem, family)
        assert not search.solves(problem._replace(target=problem.target + 1), steps)


def solutions(problem: Problem, family: Family) -> set[str]:
    """The paths of all solutions, by trying everything."""
    found: set[str] = set()

    def join(items: tuple[int, ...], steps: tuple[Step, ...]) -> None:
        if len(items) == 1:
            if items[0] == problem.target:
                found.add(search.path(steps))
            return
        for i, left in enumerate(items):
            for j, right in enumerate(items):
                if i == j:
                    continue
                rest = tuple(item for n, item in enumerate(items) if n not in (i, j))
                for sign in family.signs:
                    result = search.SIGNS[sign](left, right)
                    if 1 <= result <= family.bound:
                        join((*rest, result), (*steps, Step(left, sign, right, result)))

    join(problem.numbers, ())
    return found


def test_a_response_is_right_only_by_its_own_numbers_used_once():
    problem = Problem((3, 7, 12), 33)
    text = "7 * 3 = 21 ; 21 + 12 = 33"
    right = search.parse(text.split())
    assert right == [Step(7, "*", 3, 21), Step(21, "+", 12, 33)] and search.solves(problem, right)
    for text in ("7 * 3 = 21", "7 * 3 = 20 ; 20 + 13 = 33", "3 * 7 = 21 ; 21 + 3 = 24", "12 + 21 = 33"):
        assert not search.solves(problem, search.parse(text.split()))
    for text in ("", "7 * 3", "7 * 3 = 21 ;", "7 * 3 = 21 + 21 + 12 = 33", "7 / 3 = 2", "x * 3 = 21"):
        assert search.parse(text.split()) is None
    assert search.path(right) == search.path([Step(3, "*", 7, 21), Step(12, "+", 21, 33)])


@pytest.mark.parametrize("name", SEARCH_TASKS)
def test_a_language_reads_what_it_writes(name):
    task = tasks.TASKS[name].search
    words = [word for of_concept in task.language.words.values() for word in of_concept]
    assert len(words) == len(set(words)) == len(task.language.vocabulary) - len(spelling.SPECIAL)
    rng = random.Random(1)
    for _ in range(20):
        _, steps = search.play(task.family, rng)
        assert task.steps(task.response(steps, rng)) == steps


def test_a_smaller_share_of_synonyms_is_part_of_a_larger_one():
    rich = [{c for c, w in spelling.synonyms(30, s).words.items() if len(w) == 4} for s in (0, 0.5, 1)]
    assert rich[0] == set() and rich[0] < rich[1] < rich[2]
    assert len(rich[2]) == 31 + len(spelling.SIGNS)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_problem_is_in_both_splits_and_the_seed_alone_decides(name):
    rows = getattr(tasks, f"rows_{name}")
    trained, held_out = rows("train", 0), rows("test", 1)
    assert len(trained) == tasks.TRAINING_PROBLEMS and len(held_out) == tasks.HELD_OUT_PROBLEMS
    assert rows("test", 1) == held_out != rows("test", 2)

    def known(row):
        target, *numbers = row["answer"].split()
        return (target, *sorted(numbers)) if numbers else (row["problem"],)

    assert not {known(row) for row in trained} & {known(row) for row in held_out}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_settings_that_hold_together(arm):
    for name in ("synonyms", "countdown", "smollm2"):
        settings = trial.settings_of(tasks.TASKS[name], arm, 3, {})
        assert settings.seed == 3
        changed = ARMS[arm].changes(tasks.TASKS[name])
        assert settings.mixing.active == (changed.get("mixing.rate") != 0.0)


def test_random_rows_have_the_true_weights_and_matched_ones_the_true_cosine():
    embedding_VD = jax.random.normal(jax.random.key(0), (40, 16)) + 0.5
    rows, first = 64, 3
    step = StepContext(
        logits_BV=jax.random.normal(jax.random.key(1), (rows, 40)),
        truncated_logits_BV=None,
        token_B=jnp.zeros(rows, jnp.int32),
        keys_B2=jax.random.bits(jax.random.key(2), (rows, 2)),
        position_B=jnp.arange(rows) % 7,
        table_VC=neighbor_table(embedding_VD, 3),
        temperature=1.0,
        embedding_VD=embedding_VD,
    )
    true = neighbor_mixture(step.logits_BV, step.table_VC)
    drawn = strategies.random_rows(first, Mixing(), step).mixture
    np.testing.assert_array_equal(drawn.weights, true.weights)
    matched = strategies.matched_rows(first, Mixing(), step).mixture
    for mixture in (drawn, matched):
        np.testing.assert_array_equal(mixture.ids[:, 0], true.ids[:, 0])
        assert int(mixture.ids[:, 1:].min()) >= first and int(mixture.ids.max()) < 40
        assert not (mixture.ids[:, 1:] == mixture.ids[:, :1]).any()
        assert (mixture.ids[:, 1:] != true.ids[:, 1:]).mean() > 0.9
    np.testing.assert_allclose(matched.weights.sum(axis=1), 1.0, rtol=1e-6)
    found, wanted = (cosine_to_anchor(embedding_VD, mixture) for mixture in (matched, true))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert float(jnp.abs(cosine_to_anchor(embedding_VD, drawn) - wanted).mean()) > 0.01


def test_the_paired_interval_is_that_of_student_and_the_bootstrap_is_near_it():
    gaps_SP = np.random.RandomState(3).normal(0.02, 0.3, (24, 256))
    found = analysis.paired_difference(gaps_SP)
    means_S = gaps_SP.mean(axis=1)
    half = 2.0687 * means_S.std(ddof=1) / 24**0.5  # of Student's t with 23 degrees of freedom
    assert (found.low, found.high) == pytest.approx((means_S.mean() - half, means_S.mean() + half), abs=1e-6)
    low, high = analysis.hierarchical_interval(gaps_SP, resamples=1000)
    assert high - low == pytest.approx(2 * half * 2**0.5, rel=0.2)  # seeds, and problems within them
    assert analysis.paired_difference(np.zeros((3, 5))).p == 1.0


def test_holms_adjusted_p_values():
    assert analysis.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_outcomes():
    def of(low, high, p):
        return analysis.verdict(analysis.Difference(24, (low + high) / 2, 0.0, low, high, p), p)

    assert of(0.012, 0.03, 0.001) == "effect"
    assert of(0.002, 0.008, 0.01) == "small effect"
    assert of(-0.004, 0.009, 0.4) == "none"
    assert of(-0.004, 0.011, 0.4) == "inconclusive"
    assert analysis.detectable(1.0, 24) == pytest.approx(0.600, abs=0.01)  # of tables for t tests


def test_the_plan_is_balanced_in_seeds_and_its_runs_are_found_again(tmp_path):
    runs = plan.runs()
    core = [key for key in runs if key[1] in CORE]
    assert [key[2] for key in core] == sorted(8 * [*plan.CORE_SEEDS])
    assert {key[:2] for key in core[:8]} == {(task, arm) for task in plan.CORE_TASKS for arm in CORE}
    assert len(runs) == len(set(runs))
    task, arm, seed = runs[0]
    for _ in range(2):
        store.append({"task": task, "arm": arm, "seed": seed}, tmp_path)
    assert store.missing(runs, tmp_path) == runs[1:]
    assert len(store.read(tmp_path)) == 1


def test_every_number_of_the_page_comes_from_the_records():
    records = store.read()
    assert report.page(records, store.read_cases()) == report.PAGE.read_text(encoding="utf-8")
    assert report.plot(report.primary(report.by_arm(records))) == report.PLOT.read_text(encoding="utf-8")


def test_counts_are_kept_in_two_letters_each():
    counts = [0, 64, 7, 255]
    assert trial.packed(counts) == "004007ff"
    np.testing.assert_array_equal(trial.unpacked("004007ff"), counts)


SMALL = {
    "warm_start.num_layers": 1,
    "warm_start.hidden_size": 16,
    "warm_start.intermediate_size": 16,
    "warm_start.steps": 2,
    "warm_start.batch": 4,
    "rollout.prompts": 2,
    "rollout.group": 2,
    "train.mini_batch_prompts": 2,
    "rollout.slots": 4,
    "train.rows_per_device": 1,
    "train.unroll": False,
    "eval.problems": 4,
}


def test_a_run_from_its_base_to_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.study.bases.EXAMPLES", 64)
    monkeypatch.setattr("benchmarks.study.trial.EVALUATION_SLOTS", 64)
    study = trial.Study(tmp_path, mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1]), SMALL, budget=1)
    record = study.run("synonyms", "ngrpo", 7)
    assert trial.unpacked(record["correct"]).shape == (4,) and record["base"] == 1
    assert record["train"]["steps"] == 1 and record["train"]["tokens"] > 0
    assert 0 <= record["train"]["zero_variance"] <= 1 and record["length"] <= 12
