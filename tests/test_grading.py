r"""Whether an answer is the gold: the shared cases, and the rules of docs/grading.md with cases of their
own."""

import json
import pathlib
import re

import pytest

from ngrpo_jax.tasks.grading import symbolic
from ngrpo_jax.tasks.grading.comparison import Comparison
from ngrpo_jax.tasks.grading.reading import read, variables_of
from ngrpo_jax.tasks.grading.tokens import tokenize
from ngrpo_jax.tasks.grading.unicode import to_latex
from ngrpo_jax.tasks.rewards import Grader

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "data"
PAGE = HERE.parent / "docs" / "grading.md"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline_s=20.0) as grader:
        yield grader


@pytest.fixture(scope="module")
def by_math_verify():
    return symbolic.load()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize(("name", "count"), [("grading_kinds", 533), ("grading_cases", 48)])
def test_shared_cases(name, count, grader):
    cases = rows(SHARED / f"{name}.jsonl")
    rewards = grader.grade([c["response"] for c in cases], [c["gold"] for c in cases], "math")
    wrong = [
        case["id"] for case, reward in zip(cases, rewards, strict=True) if bool(reward) != case["correct"]
    ]
    assert len(cases) == count and not wrong


def test_own_cases(grader):
    cases = rows(HERE / "grading_cases.jsonl")
    responses = [f"so \\boxed{{{case['answer']}}}" for case in cases]
    verdicts = grader.verdicts(responses, [case["gold"] for case in cases])
    assert len(cases) > 500
    wrong = [(c, v) for c, v in zip(cases, verdicts, strict=True) if v.equal != c["equal"]]
    assert not wrong


def test_the_page_tells_the_truth(grader):
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:4]]
        for line in PAGE.read_text(encoding="utf-8").split("\n")
        if line.startswith("| `")
    ]
    golds, answers, verdicts = zip(*rows, strict=True)
    plain = [[cell.strip("`").replace("\\|", "|") for cell in cells] for cells in (golds, answers)]
    found = grader.verdicts([f"\\boxed{{{answer}}}" for answer in plain[1]], plain[0])
    wrong = [row for row, verdict in zip(rows, found, strict=True) if verdict.equal != (row[2] == "equal")]
    assert len(rows) > 50 and set(verdicts) == {"equal", "not equal"} and not wrong


def test_no_verdict_depends_on_the_quick_path(by_math_verify):
    """What plain reading decides, the comparison by sorts decides the same way."""
    for case in rows(HERE / "grading_cases.jsonl"):
        answer, gold = (tokenize(to_latex(case[name])) for name in ("answer", "gold"))
        a, g = read(answer, variables_of(gold)), read(gold, variables_of(answer))
        assert Comparison(by_math_verify).compare(a, g).equal == case["equal"], case
