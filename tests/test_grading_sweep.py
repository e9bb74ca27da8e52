r"""Real golds, rewritten harmlessly and spoilt: rewritten ones stay right, spoilt ones become wrong."""

import json
import pathlib
import re

import pytest

from ngrpo_jax.tasks.rewards import Grader

DATA = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
SETS = ("math500", "deepscaler_subset", "amc23", "aime24")
WANTED = 0.998
PLAIN = re.compile(r"-?[0-9.,]+")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")


@pytest.fixture(scope="module")
def golds():
    """Every different gold of the sets; of the plain integers every tenth."""
    found = {}
    for name in SETS:
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        found |= dict.fromkeys(json.loads(line)["answer"].strip() for line in lines if line)
    plain = [gold for gold in found if PLAIN.fullmatch(gold)]
    return [gold for gold in found if not PLAIN.fullmatch(gold)] + plain[::10]


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline_s=20.0) as grader:
        yield grader


def sized(gold):
    r"""\left and \right before the brackets, where each opening one has a closing one."""
    balanced = len(re.findall(r"[(\[]", gold)) == len(re.findall(r"[)\]]", gold))
    if "\\left" in gold or not balanced:
        return gold
    return re.sub(r"[)\]]", r"\\right\g<0>", re.sub(r"[(\[]", r"\\left\g<0>", gold))


REWRITTEN = {
    "the same": lambda gold: gold,
    "spaces": lambda gold: re.sub(r"(?<![\\])([-+=,<>])", r" \1 ", gold),
    "space around": lambda gold: f"  {gold}\n",
    "thin spaces": lambda gold: f"\\,{gold}\\;",
    "dollars": lambda gold: f"${gold}$",
    "round delimiters": lambda gold: f"\\({gold}\\)",
    "dfrac": lambda gold: re.sub(r"\\[td]?frac", r"\\dfrac", gold),
    "tfrac": lambda gold: re.sub(r"\\[td]?frac", r"\\tfrac", gold),
    "left and right": sized,
    "braces": lambda gold: f"{{{gold}}}",
    "two pairs of braces": lambda gold: f"{{{{{gold}}}}}",
    "full stop": lambda gold: f"{gold}.",
    "displaystyle": lambda gold: f"\\displaystyle {gold}",
    "text": lambda gold: f"\\text{{{gold}}}" if gold.isalpha() else gold.replace("\\text", "\\mathrm"),
    "bold": lambda gold: f"\\mathbf{{{gold}}}",
    "colour": lambda gold: f"\\textcolor{{blue}}{{{gold}}}",
    "row break": lambda gold: f"{gold} \\\\",
    "zero-width space": lambda gold: f"\u200b{gold}\ufeff",
    "unicode minus": lambda gold: gold.replace("-", "−") if "begin" not in gold else gold,
}


def spoilt(gold):
    """Every way to change a digit, change a sign, or drop a term, each with what was done."""
    for match in re.finditer("[0-9]", gold):
        digit = str((int(match[0]) + 1) % 10)
        yield f"digit {match.start()}", gold[: match.start()] + digit + gold[match.end() :]
    for match in re.finditer(r"(?<![{(,\\])[-+]", gold):
        if match.start():
            other = "-" if match[0] == "+" else "+"
            yield f"sign {match.start()}", gold[: match.start()] + other + gold[match.end() :]
    simple = not re.search(r"[,=:<>(\[]|pm|begin|text|in |\^\\circ|\^\{\\circ|\\\$", gold)
    if simple and re.search("[0-9A-Za-z]", gold):
        yield "negated", gold[1:] if gold.startswith("-") else f"-{gold}"
    top = re.sub(r"\{[^{}]*\}", lambda m: "#" * len(m[0]), gold)
    top = re.sub(r"\{[^{}]*\}", lambda m: "#" * len(m[0]), top)
    last = max(top.rfind("+"), top.rfind("-"))
    if last > 0 and not re.search(r"[,=()\[\]&]", top):
        yield "last term dropped", gold[:last].rstrip()
    if re.fullmatch(r"[0-9]+_\{?\(?[0-9]\)?\}?", gold):
        yield "base dropped", gold.split("_")[0]


def rate(grader, cases, expected):
    """(share of verdicts as expected, those that are not)."""
    rewards = grader.grade(
        [f"so \\boxed{{{answer}}}" for _, _, answer in cases], [c[1] for c in cases], "math"
    )
    wrong = [case for case, reward in zip(cases, rewards, strict=True) if bool(reward) != expected]
    return 1 - len(wrong) / len(cases), wrong


def test_rewritten_golds_stay_right(golds, grader):
    cases = [(name, gold, rewrite(gold)) for gold in golds for name, rewrite in REWRITTEN.items()]
    share, wrong = rate(grader, cases, True)
    assert not [case for case in wrong if case[0] == "the same"]
    assert share >= WANTED, wrong


def test_spoilt_golds_become_wrong(golds, grader):
    cases = [(name, gold, changed) for gold in golds for name, changed in spoilt(gold)]
    share, wrong = rate(grader, cases, False)
    assert len(cases) > 1000
    assert share >= WANTED, wrong
