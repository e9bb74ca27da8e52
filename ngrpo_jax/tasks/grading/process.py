"""A grading process: answers and golds in, verdicts out, under a deadline and a memory limit.

Run by `workers` as a program of its own, so that no import of the parent's (JAX above all) is repeated here.
It imports math-verify once and forks a child that answers; when a question ends the child, the next is
forked, which takes a millisecond. The kernel enforces both limits, also in the middle of a C function:
SIGALRM in its default disposition ends the child, RLIMIT_AS refuses memory.

    python -m ngrpo_jax.tasks.grading.process DEADLINE_SECONDS MEMORY_MB

Reads one JSON line a question, [answer, gold] or [gold], both LaTeX without a box. Writes READY once, then
the fields of a `Reply` as one JSON line a question. Ends when its input ends.
"""

import json
import logging
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, NoReturn

READY = b"ready\n"
# How a verdict was reached.
RULE, ALGEBRA, UNREADABLE_GOLD, TIMEOUT, FAILED = "rule", "algebra", "unreadable gold", "timeout", "failed"

_START_SECONDS = 60.0  # to import math-verify
_MAX_WORDS = 12  # of a gold in words; a longer one is a whole solution, which no response spells


class Reply(NamedTuple):
    """The verdict on a question; of [gold] alone, `equal` says whether it can be read."""

    equal: bool
    way: str
    rule: str = ""  # the rule of comparison that decided
    answer: str = ""  # the sort of the answer
    gold: str = ""  # the sort of the gold

    def line(self) -> bytes:
        """As one line of JSON."""
        return json.dumps(self).encode() + b"\n"


Judge = Callable[[list[str]], Reply]


def main(deadline_s: float, memory_mb: int) -> NoReturn:
    """Import math-verify under the memory limit, then keep a child that answers until the input ends."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGTERM})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    judge = load_judge()
    judge(["\\sum_{k=1}^{n} k", "x/2"])  # the first use of math-verify compiles and caches much
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # nothing that a library prints may reach the pipes
        os.dup2(silence, descriptor)
    signal.setitimer(signal.ITIMER_REAL, 0)
    # The whole group gets SIGTERM: the child ends of it, and this process after it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    busy = mmap.mmap(-1, 1)  # shared with the child: 1 while it has a question without an answer
    answers.write(READY)
    while True:
        busy[0] = 0
        child = os.fork()
        if child == 0:
            _answer(judge, questions, answers, deadline_s, busy)
        if signal.SIGTERM in signal.sigpending():  # it came just before the fork, and missed the child
            os.kill(child, signal.SIGTERM)
        status, stopped = _wait(child)
        if status in (0, -signal.SIGTERM):
            os._exit(0)  # the interpreter's own end takes a second with sympy's heap
        if busy[0]:
            answers.write(Reply(False, TIMEOUT if stopped or status == -signal.SIGALRM else FAILED).line())


def _wait(child: int) -> tuple[int, bool]:
    """The child's exit status, and whether something had stopped it: no deadline ends a stopped process."""
    _, status = os.waitpid(child, os.WUNTRACED)
    stopped = os.WIFSTOPPED(status)
    if stopped:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), stopped


def _answer(judge: Judge, questions: BinaryIO, answers: BinaryIO, deadline_s: float, busy: mmap.mmap) -> None:
    """The loop of the child: never returns; ends with status 0 when the input does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for line in questions:
        busy[0] = 1
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        try:
            reply = judge(question)
        except MemoryError:
            os._exit(1)  # the heap is full of remains: the next child starts afresh
        except Exception:  # whatever sympy makes of hostile text is a failure to compare
            reply = Reply(False, FAILED)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # In this order: killed in between, a child leaves its question without a reply, never with two.
        busy[0] = 0
        answers.write(reply.line())
    os._exit(0)


def load_judge() -> Judge:
    """The function that answers questions; imports math-verify."""
    from . import symbolic
    from .comparison import Comparison
    from .forms import Tokens, UnreadableError
    from .reading import read, variables_of
    from .sorts import Answer, Text
    from .tokens import tokenize
    from .unicode import to_latex

    logging.disable(logging.CRITICAL)
    by_math_verify = symbolic.load()

    def tokens_of(text: str) -> Tokens | None:
        try:
            return tokenize(to_latex(text))
        except UnreadableError:
            return None

    def readable(gold: Answer) -> bool:
        if isinstance(gold, Text):
            return len(gold.words) <= _MAX_WORDS
        return type(gold) is not Answer or symbolic.is_covered(gold.tokens)

    def judge(question: list[str]) -> Reply:
        *answer, gold = map(tokens_of, question)
        if not gold:
            return Reply(False, UNREADABLE_GOLD)
        if not answer:
            read_gold = read(gold)
            return Reply(readable(read_gold), RULE, gold=read_gold.sort)
        mine = answer[0]
        if mine is None:
            return Reply(False, RULE, "unread")
        a, g = read(mine, variables_of(gold)), read(gold, variables_of(mine))
        comparison = Comparison(by_math_verify)
        verdict = comparison.compare(a, g)
        way = ALGEBRA if comparison.used_algebra else RULE
        if not verdict.equal and not readable(g):
            way = UNREADABLE_GOLD
        return Reply(verdict.equal, way, verdict.rule, a.sort, g.sort)

    return judge


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
