"""Rewards: which answer is graded, verdicts by reading, and processes that survive what models write."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ngrpo_jax.errors import UserError
from ngrpo_jax.tasks import rewards, workers
from ngrpo_jax.tasks.grading import extraction, plain
from ngrpo_jax.tasks.rewards import Grader, choice_reward, load_reward, math_reward

ROOT = pathlib.Path(__file__).parent.parent

HANGS = "\\boxed{\\int_0^1 x^{x^{x}} dx}"  # math-verify takes seconds for it
PATHOLOGICAL = {
    "lone surrogates": "\ud800\udfff" * 1000,
    "NUL bytes": "\0" * 1000,
    "backslashes": "\\" * 10**6,
    "opening braces": "{" * 10**6,
    "unclosed boxes": "\\boxed{" * 10**5,
    "boxes without braces": "\\boxed   " * 10**5,
    "deep box": "\\boxed{" + "{" * 10**5 + "}" * (10**5 + 1),
    "answers without letters": "answer:  ** (" * 10**5,
    "combining marks": "answer: \\boxed{a" + "\u0315\u0300" * 10**5 + "}",
    "surrogate in the box": "\\boxed{\ud800}",
    "NUL in the box": "\\boxed{\0+x}",
    "empty": "",
}


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline_s=30.0) as grader:
        yield grader


# What the answer is


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{3", None),
        ("\\boxed{4 and {\\boxed{5}", "5"),
        ("\\boxed{x=\\boxed{5}}", "5"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{x\\right.}", "\\left\\{x\\right."),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\\\\\boxed {7}", "7"),
        ("\\boxed{}", ""),
        ("boxed{5}", None),
        ("} \\boxed{6}", "6"),
    ],
)
def test_the_answer_is_the_last_closed_box(text, answer):
    assert extraction.last_boxed(text) == answer


def test_the_answer_stands_after_the_thinking():
    assert math_reward("\\boxed{5}</think>\\boxed{6}", "6") == 1.0
    assert math_reward("\\boxed{5}</think>\\boxed{6}", "5") == 0.0
    assert math_reward("\\boxed{5}</think>so 5", "5") == 0.0
    assert math_reward("\\boxed{5}</think></think>\\boxed{4}", "4") == 1.0
    assert math_reward("still thinking, perhaps \\boxed{5}", "5") == 1.0
    assert math_reward("5", "5") == 0.0


# When plain reading settles it


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("7,425,000", "7425000"),
        ("7{,}425{,}000", "7425000"),
        ("11,\\! 111,\\! 111", "11111111"),
        ("7 425 000", "7425000"),
        (".4", "0.4"),
        ("1000.0", "1000"),
        ("025", "25"),
        ("1e3", "1000"),
        ("-\\dfrac{1}{2}", "-1/2"),
        ("\\frac12", "0.5"),
        ("0.333333", "\\frac{1}{3}"),
        ("$10$", "\\$10"),
        ("4２", "42"),
        ("−3", "-3"),
        ("½", "\\frac{1}{2}"),
        ("x²", "x^{2}"),
        ("√2", "\\sqrt{2}"),
        ("2π", "2\\pi"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\left( 3, \\tfrac{\\pi}{2} \\right).", "(3,\\frac{\\pi}{2})"),
    ],
)
def test_plain_reading_says_equal(answer, gold):
    assert plain.quick_verdict(answer, gold) is True
    assert plain.quick_verdict(gold, answer) is True


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5", "7"),
        ("0.333", "\\frac{1}{3}"),
        ("0.0000001", "0.0000002"),  # equal after rounding to six places, as math-verify does
        ("\\frac{1}{10000000}", "0.0000002"),
        ("999.9999999", "1000"),
        ("", "5"),
        ("1/3", "2/3"),
    ],
)
def test_plain_reading_says_different(answer, gold):
    assert plain.quick_verdict(answer, gold) is False


@pytest.mark.parametrize(
    "answer", ["x+1", "1,2", "12,34", "1, 234", "\\frac{1}{0}", "50\\%", "1e9999", "1:00", "2^{3}", "2 125/3"]
)
def test_plain_reading_leaves_the_rest_open(answer):
    assert plain.quick_verdict(answer, "8") is None


def test_an_answer_longer_than_any_gold_is_compared_as_it_stands():
    long = "x+" * plain.MAX_ANSWER
    assert plain.quick_verdict(long, "x") is False
    assert plain.quick_verdict(long, long) is True


def test_plain_cases_need_no_worker(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    grader = Grader(workers=1)
    assert grader.grade(["\\boxed{5}", "\\boxed{6}", "none"], ["5", "5", "5"], "math") == [1.0, 0.0, 0.0]
    assert (grader.counts.graded, grader.counts.plain, grader.counts.no_box) == (3, 2, 1)


# When it takes algebra


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("\\frac{x}{7}+\\frac{2}{7}", "\\frac{x+2}{7}", True),
        ("x+1", "x+2", False),
        ("\\{2, 1\\}", "\\{1,2\\}", True),
        ("28\\%", "28", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("√8", "2√2", True),
        ("??? 5", "5", False),  # nothing is fished out of what is no mathematics
        ("5 \\text{ or } 7", "5", False),
    ],
)
def test_algebra(grader, answer, gold, equal):
    assert grader.grade([f"\\boxed{{{answer}}}"], [gold], "math") == [float(equal)]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/2004!", "1/2006!"),
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
        ("\\left(1, \\frac{1}{2^{99}}\\right)", "\\left(1, \\frac{1}{2^{98}}\\right)"),
        ("\\frac{\\sqrt{2}}{10^{20}}", "\\frac{\\sqrt{3}}{10^{20}}"),
        ("\\frac{x}{2^{99}}", "\\frac{x}{2^{98}}"),
        ("10^{100}", "10^{100}+1"),
    ],
)
def test_small_numbers_are_not_all_equal(grader, answer, gold):
    assert grader.grade([f"\\boxed{{{answer}}}"] * 2, [gold, answer], "math") == [0.0, 1.0]


def test_small_numbers_of_other_forms_are_equal(grader):
    pairs = [
        ("\\frac{1}{2^{99}}", "2^{-99}"),
        ("\\frac{1}{\\sqrt{2}\\cdot 10^{20}}", "\\frac{\\sqrt{2}}{2 \\cdot 10^{20}}"),
    ]
    for answer, gold in pairs:
        assert grader.grade([f"\\boxed{{{answer}}}"], [gold], "math") == [1.0]


def test_rewards_keep_their_order_over_processes_and_repetitions(grader):
    responses = [f"\\boxed{{x+{i % 5}}}" for i in range(40)]
    expected = [float(i % 5 == 3) for i in range(40)]
    before = grader.counts.cached
    assert grader.grade(responses, ["3+x"] * 40, "math") == expected
    assert grader.grade(responses, ["3+x"] * 40, "math") == expected
    assert grader.counts.cached - before == 35 + 40


def test_verdicts_are_remembered_but_no_more_than_so_many(monkeypatch):
    monkeypatch.setattr(rewards, "_CACHED_REPLIES", 2)
    with Grader(workers=1) as grader:
        for answer, cached in (("x+1", 0), ("x+2", 0), ("x+1", 1), ("x+3", 1), ("x+1", 2), ("x+2", 2)):
            assert grader.grade([f"\\boxed{{{answer}}}"], ["1+x"], "math") == [float(answer == "x+1")]
            assert grader.counts.cached == cached


def test_time_outs_are_never_remembered():
    with Grader(workers=1, deadline_s=0.5) as grader:
        for times in (1, 2):
            assert grader.grade([HANGS], ["5"], "math") == [0.0]
            assert (grader.counts.timeouts, grader.counts.cached) == (times, 0)


def test_throughput_of_a_batch():
    grader = Grader(workers=1)
    assert grader.counts.per_second == 0.0
    grader.grade(["\\boxed{5}"] * 10, ["5"] * 10, "math")
    before = grader.snapshot()
    grader.grade(["\\boxed{5}"] * 40, ["5"] * 40, "math")
    batch = grader.counts.since(before)
    assert (batch.graded, batch.plain, before.graded) == (40, 40, 10)
    assert batch.per_second == pytest.approx(40 / batch.seconds)


def test_golds_and_responses_must_pair_up(grader):
    with pytest.raises(ValueError, match="zip"):
        grader.grade(["a", "b"], ["a"], "math")


# Hostile text


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_no_text_makes_a_reward_raise(name):
    assert math_reward(PATHOLOGICAL[name], "5") == 0.0
    assert choice_reward(PATHOLOGICAL[name], "B") == 0.0


def test_past_the_deadline_the_reward_is_zero_and_the_next_is_graded():
    with Grader(workers=1, deadline_s=0.5) as grader:
        for i in (1, 2, 3):
            assert grader.grade([HANGS], [f"{i}"], "math") == [0.0]
            assert grader.counts.timeouts == i
            assert grader.grade([f"\\boxed{{y+{i}}}"], [f"{i}+y"], "math") == [1.0]
        assert grader.counts.failures == 0


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("busy", [False, True])
def test_a_stopped_process_costs_its_own_response_at_most_and_is_replaced(generation, busy):
    """Of a grading process and its child, one is stopped by a signal, with a question or between two."""
    others = set(children(os.getpid()))
    with Grader(workers=1, deadline_s=1.0) as grader:
        assert grader.grade(["\\boxed{y+1}"], ["1+y"], "math") == [1.0]
        (parent,) = set(children(os.getpid())) - others
        (child,) = children(parent)
        stopped = parent if generation == 1 else child
        if busy:
            threading.Timer(0.3, os.kill, (stopped, signal.SIGSTOP)).start()
        else:
            os.kill(stopped, signal.SIGSTOP)
        begun = time.monotonic()
        assert grader.grade([HANGS if busy else "\\boxed{y+2}"], ["3+y"], "math") == [0.0]
        assert time.monotonic() - begun < 2.0
        assert grader.grade(["\\boxed{y+4}", "\\boxed{y+5}"], ["4+y", "5+y"], "math") == [1.0, 1.0]
    assert grader.counts.timeouts + grader.counts.failures <= 1
    for pid in (parent, child):
        assert not pathlib.Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_child_that_is_killed_between_questions_shifts_no_reply():
    others = set(children(os.getpid()))
    with Grader(workers=1, deadline_s=5.0) as grader:
        assert grader.grade(["\\boxed{y+1}"], ["1+y"], "math") == [1.0]
        (parent,) = set(children(os.getpid())) - others
        for i in range(2, 6):
            (child,) = children(parent)
            os.kill(child, signal.SIGKILL)
            while children(parent) in ([], [child]):
                time.sleep(0.01)
            answers = [f"\\boxed{{y+{i}}}", f"\\boxed{{z+{i}}}"]
            assert grader.grade(answers, [f"{i}+y", f"{i + 1}+z"], "math") == [1.0, 0.0]
    assert grader.counts.failures == grader.counts.timeouts == 0


def test_the_memory_limit_binds():
    worker = workers.Worker(deadline_s=5.0, memory_mb=20)
    with pytest.raises(RuntimeError, match=r"a grading worker does not start .* 20 MB of memory are enough"):
        worker.ask(("x", "y"))


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_killed_process_grades_zero_and_is_replaced():
    others = set(children(os.getpid()))
    with Grader(workers=1) as grader:
        assert grader.grade(["\\boxed{y+1}"], ["1+y"], "math") == [1.0]
        (parent,) = set(children(os.getpid())) - others
        os.killpg(parent, signal.SIGKILL)
        assert grader.grade(["\\boxed{y+2}"], ["2+y"], "math") == [0.0]
        assert grader.counts.failures == 1
        assert grader.grade(["\\boxed{y+2}"], ["2+y"], "math") == [1.0]


def test_rewards_work_in_any_thread():
    scores = collections.deque()
    threads = [
        threading.Thread(target=lambda i=i: scores.append(math_reward(f"\\boxed{{z+{i}}}", f"{i}+z")))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(scores) == [1.0] * 6


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"deadline_s": 0.0}, {"memory_mb": 1}])
def test_a_grader_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="grading needs at least"):
        Grader(**arguments)


def children(process):
    """The running processes that `process` has started."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if int(parent) == process and state != "Z":
            found.append(int(folder.name))
    return found


def run_script(tmp_path, text):
    """A main module that leaves a mark each time it is imported or run, then runs `text`."""
    (tmp_path / "marked.py").write_text("open('marks', 'a').write('x')\n")
    (tmp_path / "main.py").write_text("import marked\n" + textwrap.dedent(text))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_workers_do_not_import_the_main_module_again_and_nothing_imports_jax(tmp_path):
    done = run_script(
        tmp_path,
        """
        import sys
        from ngrpo_jax.tasks.rewards import Grader
        with Grader(workers=2) as grader:
            print(grader.grade([f"\\\\boxed{{x+{i}}}" for i in range(4)], ["x+1"] * 4, "math"))
        print("jax" in sys.modules, "math_verify" in sys.modules)
        """,
    )
    assert done.stdout == "[0.0, 1.0, 0.0, 0.0]\nFalse False\n", done.stderr
    assert (tmp_path / "marks").read_text() == "x"


@pytest.mark.parametrize("ending", ["", "grader.close()"])
def test_the_interpreter_ends_without_hanging_and_leaves_no_process(tmp_path, ending):
    done = run_script(
        tmp_path,
        f"""
        import os
        from ngrpo_jax.tasks.rewards import Grader
        grader = Grader(workers=2, deadline_s=0.2)
        hangs = "\\\\boxed{{\\\\int_0^1 x^{{x^{{x}}}} dx}}"
        grader.grade([hangs, "\\\\boxed{{x+1}}"], ["5", "1+x"], "math")
        from tests.test_rewards import children
        print(children(os.getpid()))
        {ending}
        """,
    )
    assert done.returncode == 0 and done.stderr == ""
    groups = json.loads(done.stdout)
    assert len(groups) == 2
    for group in groups:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_closing_right_after_a_time_out_does_not_hang(tmp_path):
    done = run_script(
        tmp_path,
        """
        from ngrpo_jax.tasks.rewards import Grader
        for _ in range(3):
            with Grader(workers=1, deadline_s=0.02) as grader:
                grader.grade(["\\\\boxed{\\\\int_0^1 x^{x^{x}} dx}"], ["5"], "math")
        """,
    )
    assert done.returncode == 0, done.stderr


# Multiple choice


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: A", "A"),
        ("so\nAnswer: A\nno,\nAnswer: B.", "B"),
        ("in a line, the answer: C, of course", "C"),
        ("**Answer:** B", "B"),
        ("**Answer: C**", "C"),
        ("Answer：Ｄ", "D"),
        ("Answer: (B)", "B"),
        ("Answer: [B]", "B"),
        ("Answer: $\\boxed{\\text{C}}$", "C"),
        ("Answer: \\text{C}", "C"),
        ("Answer:\nB", "B"),
        ("Answer: A, since B is wrong", "A"),
        ("Answer: Apple", None),
        ("Answer: <A/B/C/D>", None),
        ("Answer: A or B", None),
        ("the last line: *Answer*: [C]  ", "C"),
        ("Answer: \\textbf{(D)}", "D"),
        ("Answer : $\\mathrm{A}$", "A"),
        ("Answer: A</think>B", None),
        ("B is right, so I choose B", None),
        ("Answer: E", None),
        ("A", None),
        ("Answer: A</think>", None),
        ("Answer: A</think>Answer: D", "D"),
    ],
)
def test_the_choice_is_the_last_answer_after_the_thinking(response, letter):
    assert extraction.choice_letter(extraction.after_thinking(response)) == letter
    for gold in "ABCD":
        assert choice_reward(response, gold) == float(gold == letter)


@pytest.mark.parametrize("gold", ["B", "(B)", "b", "B.", " B "])
def test_the_gold_letter_may_be_dressed(gold):
    assert choice_reward("Answer: B", gold) == 1.0


def test_no_gold_letter_is_never_right():
    assert choice_reward("nothing", "") == choice_reward("Answer: B", "none") == 0.0


# A reward of the user's own


def half_for_length(response, gold):
    return 0.5 if len(response) == len(gold) else 0


def text_instead(response, gold):
    return "good"


def too_large(response, gold):
    return 1e300


def infinite(response, gold):
    return -float("inf")


def exits(response, gold):
    sys.exit(0)


def raises(response, gold):
    return {}["missing"]


async def coroutine(response, gold):
    return 1.0


def prints_much(response, gold):
    return "a\n" * 1000


def test_a_users_reward_scores_batches(grader):
    path = f"{__name__}:half_for_length"
    assert load_reward(path)("ab", "cd") == 0.5
    assert grader.grade(["ab", "abc"], ["cd", "de"], path) == [0.5, 0.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text_instead", "gave 'good', which is no finite number of float32"),
        ("too_large", r"gave 1e\+300, which is no finite number of float32"),
        ("infinite", "gave -inf, which is no finite number of float32"),
        ("prints_much", "which is no finite number of float32"),
        ("exits", r"failed \(SystemExit: 0\)"),
        ("raises", r"failed \(KeyError: 'missing'\)"),
        ("coroutine", "gave a coroutine; define it without async"),
    ],
)
def test_a_users_reward_that_fails_is_one_sentence_with_the_response(grader, name, reason):
    path = f"{__name__}:{name}"
    with pytest.raises(UserError, match=f"the reward '{path}' of response p-7/2 .*{reason}") as caught:
        grader.grade(["a"], ["b"], path, ids=["p-7/2"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    with pytest.raises(UserError, match=f"the reward '{path}' of response number 1 "):
        grader.grade(["a"], ["b"], path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("half_for_length", "is no import path; write it as package.module:function"),
        ("no_such_module:f", "cannot be imported (No module named 'no_such_module')"),
        ("json:no_such_function", "module json has no function 'no_such_function'"),
        ("json:__name__", "module json has no function '__name__'"),
    ],
)
def test_a_users_reward_that_is_not_there_is_named(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_reward(path)


def test_an_unknown_reward_is_named(grader):
    with pytest.raises(ValueError, match="unknown reward 'maths'; it is math, choice, or an import path"):
        grader.grade(["a"], ["b"], "maths")
    with pytest.raises(ValueError, match="unknown reward 'maths'"):
        grader.check("maths")
    grader.check("choice")
