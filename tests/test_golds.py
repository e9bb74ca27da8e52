"""Faults of a data set: repeated and shared problems, and gold answers that cannot be read."""

import json
import subprocess

import pytest

from configs import tiny
from ngrpo_jax.errors import UserError
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.problems import check_golds, training_problems
from ngrpo_jax.tasks import cleaning, golds
from ngrpo_jax.tasks.datasets import Problem, load_training
from ngrpo_jax.tasks.rewards import Grader

# Repeated and shared problems


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $x$ if $\\dfrac{x}{2}=3$.", "Find \\(x\\) if \\[\\frac{x}{2} = 3\\]", True),
        ("What is  1 + 1?", "what is\n1+1", True),
        ("\\left( 1 , 2\\right)", "(1,2)", True),
        ("\\leftarrow", "arrow", False),
        ("ａｂ", "ab", True),
        ("What is 1+1?", "What is 1+2?", False),
        ("What is $-x$?", "What is $x$?", False),
        ("Find 10 1", "Find 1 01", True),  # the price of not caring for space
    ],
)
def test_typesetting_does_not_hide_a_problem(one, other, same):
    assert bool(cleaning.shared([one], [other])) is same


def test_shared_names_both_places():
    assert cleaning.shared(["a", "b?", "c"], ["x", "B", "b", "A."]) == [(0, 3), (1, 1)]


def test_only_white_space_may_differ_between_repeated_problems():
    assert cleaning.repeated(["a b", "A b", "a\n b ", "a b", "ab"]) == [2, 3]


def test_training_rows_that_are_empty_or_repeated_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"problem": "p", "answer": "1"}\n{"problem": "q", "answer": null}\n{"problem": "p ", "answer": 2}\n'
        '{"problem": "", "answer": "3"}\n{"problem": "r", "answer": 4}\n{"problem": "s", "answer": NaN}\n'
    )
    loaded = load_training(f"jsonl:{tmp_path / 'a.jsonl'}", seed=0)
    assert [(p.problem, p.answer) for p in loaded.problems] == [("p", "1"), ("r", "4")]
    assert (loaded.nulls, loaded.duplicates) == (3, 1)
    assert len(load_training(f"jsonl:{tmp_path / 'a.jsonl'}", seed=0, size=1).problems) == 1
    (tmp_path / "b.csv").write_text("problem,answer\n,5\n")
    with pytest.raises(ValueError, match="has only rows without a problem or answer"):
        load_training(f"csv:{tmp_path / 'b.csv'}", seed=0)
    (tmp_path / "c.jsonl").write_text('{"problem": "p"}\n')
    with pytest.raises(ValueError, match="row 1: no field 'answer'"):
        load_training(f"jsonl:{tmp_path / 'c.jsonl'}", seed=0)


def settings(tmp_path, **data):
    """Those of tiny.py, with three problems to train on, two of which stand in evaluation sets."""
    config = tiny.get_config()
    for name, rows in (("train", "p,1\nq,2\nr,3\n"), ("eval", "x,1\nP.,1\n"), ("more", "$r$,3\n")):
        (tmp_path / f"{name}.csv").write_text("problem,answer\n" + rows)
    config.data.train, config.data.eval = f"csv:{tmp_path / 'train.csv'}", f"csv:{tmp_path / 'eval.csv'}"
    config.data.train_size = None
    config.data.overlap_with = f"csv:{tmp_path / 'more.csv'}; {config.data.eval}"
    config.data.update(data)
    return resolve(config)


def test_overlap_with_evaluation_sets_is_told(tmp_path, capsys):
    assert [p.problem for p in training_problems(settings(tmp_path))] == ["p", "q", "r"]
    told = capsys.readouterr().out
    assert "1 problems are in csv:" in told and "eval.csv too, and are trained on" in told
    assert "row-1 (row-2 there)" in told and "row-3 (row-1 there)" in told


def test_overlap_is_left_out_when_asked(tmp_path, capsys):
    kept = training_problems(settings(tmp_path, drop_overlap=True))
    assert [p.problem for p in kept] == ["q"]
    assert "are left out: row-3 (row-1 there)" in capsys.readouterr().out
    (tmp_path / "all.csv").write_text("problem,answer\np,1\nq,2\nr,3\n")
    with pytest.raises(ValueError, match=r"all problems of .* are in an evaluation set too"):
        everything = f"csv:{tmp_path / 'all.csv'}"
        training_problems(settings(tmp_path, drop_overlap=True, eval=everything))


# Gold answers


UNREADABLE = {1: "??? 5", 3: "\\frac{1}{2} \\heartsuit 3", 5: "x + = 3 (", 6: "9" * 5000}


def mixed_golds():
    fine = ["5", "\\frac{1}{2}", "x^2+1", "\\text{Evelyn}", "\\boxed{(1, 2)}", "2\\pi", "7,000", "odd"]
    return [UNREADABLE.get(i, fine[i]) for i in range(len(fine))]


def test_unreadable_golds_are_found_and_readable_ones_remembered(tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "cache.txt"
    with Grader(workers=1) as grader:
        assert golds.unreadable(mixed_golds(), grader, cache) == list(UNREADABLE)
        asked = []
        monkeypatch.setattr(grader, "readable", lambda some: asked.extend(some) or [False] * len(some))
        cache.write_text(cache.read_text() + "half a li\ne")
        assert golds.unreadable(mixed_golds(), grader, cache) == list(UNREADABLE)
        assert asked == [UNREADABLE[i] for i in (1, 3, 5)]


def test_plain_golds_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    grader = Grader(workers=1, memory_mb=128)
    assert golds.unreadable(["5", "1/2", "7,425,000", "odd", "\\text{Evelyn}"], grader) == []
    grader.close()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with Grader(workers=1) as grader:
        assert golds.unreadable(["x^2+1"], grader, tmp_path / "file" / "cache.txt") == []


def test_a_gold_that_is_nested_too_deeply_counts_as_unreadable():
    with Grader(workers=1, deadline_s=0.5) as grader:
        assert golds.unreadable(["\\frac{1}{" * 400 + "x" + "}" * 400, "x^2+2"], grader) == [0]


def numbered(answers):
    return [Problem(f"row-{i}", f"p {i}", answer) for i, answer in enumerate(answers, 1)]


def test_few_unreadable_golds_are_printed_by_id(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = settings(tmp_path)
    check_golds(given, "csv:a", numbered(["5"] * 20))
    assert not capsys.readouterr().out
    check_golds(given, "csv:a", numbered(["5"] * 19 + ["??? 5"]))
    printed = capsys.readouterr().out
    assert printed.startswith("csv:a: 1 gold answers cannot be read") and printed.endswith(": row-20.\n")
    assert not golds.default_cache().exists()


SOLUTION = "She has 48/2 = <<48/2=24>>24 clips in May.\nTogether 48+24 = 72.\n#### 72"


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (["??? 5", "x + = 3 ("], "2 of 12 gold answers of csv:a cannot be read as an answer; correct them"),
        ([SOLUTION] * 2, "2 of 12 gold answers of csv:a are whole solutions.*add answer_after=#### after"),
        (
            ["so it is and " * 10] * 2,
            "are whole solutions, with which no response agrees; give the result alone",
        ),
    ],
)
def test_a_set_with_many_unreadable_golds_is_refused(bad, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"(?s){sentence}.*: row-11, row-12.$"):
        check_golds(settings(tmp_path), "csv:a", numbered(["5"] * 10 + bad))


def test_the_answer_after_a_marker_is_taken(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "p", "answer": SOLUTION}) + "\n")
    source = f"jsonl:{tmp_path / 'a.jsonl'}?problem=question&answer_after=####"
    assert [p.answer for p in load_training(source, seed=0).problems] == ["72"]
    with pytest.raises(UserError, match=r"a.jsonl, row 1: no answer after '@@'"):
        load_training(source.replace("####", "@@"), seed=0)
