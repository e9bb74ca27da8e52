"""A grading process: math-verify, one question after another, under a deadline and a memory limit.

Run as a script by `rewards`, which imports nothing but its words. It needs nothing of ours, so that no
import of the parent's (JAX above all) is repeated in it. It imports math-verify once and forks a child that
answers; when the child dies of a question, it says so and forks the next, which costs a millisecond. The
kernel enforces both limits, in the middle of a C function too: SIGALRM in its default disposition ends the
child, RLIMIT_AS refuses memory.

    python math_worker.py DEADLINE_SECONDS MEMORY_MB

Reads one JSON line a question; writes READY once, then one line a question. [answer, gold] asks whether they
are equal: EQUAL or DIFFERENT. [gold] asks whether there is mathematics in it: READABLE or UNREADABLE. Either
may end in FAILED or TIMEOUT. It ends by itself when its input does.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

READY, EQUAL, DIFFERENT = b"ready\n", b"equal\n", b"different\n"
READABLE, UNREADABLE = b"readable\n", b"unreadable\n"
FAILED, TIMEOUT = b"failed\n", b"timeout\n"

Judge = Callable[[list[str]], bytes]

_START_SECONDS = 60.0


def main(deadline_s: float, memory_mb: int) -> None:
    """Import math-verify under the memory limit, then keep a child that answers until the input ends."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGTERM})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    judge = load_judge()
    judge(["\\frac{x}{2}", "x/2"])  # the first use compiles and caches much
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # nothing that a library prints may reach the pipes
        os.dup2(silence, descriptor)
    signal.setitimer(signal.ITIMER_REAL, 0)
    # SIGTERM comes to the group: it ends the child, and this after it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    answers.write(READY)
    while True:
        child = os.fork()
        if child == 0:
            _answer(judge, questions, answers, deadline_s)
        if signal.SIGTERM in signal.sigpending():  # it came just before the fork, and missed the child
            os.kill(child, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status in (0, -signal.SIGTERM):
            return
        answers.write(TIMEOUT if status == -signal.SIGALRM else FAILED)


def _answer(judge: Judge, questions: BinaryIO, answers: BinaryIO, deadline_s: float) -> None:
    """The child's life: never returns; ends with status 0 when the input does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for line in questions:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        try:
            verdict = judge(question)
        except MemoryError:
            os._exit(1)  # the heap is full of remains: the next child starts afresh
        except Exception:  # whatever sympy makes of hostile text is a failure to compare
            verdict = FAILED
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(verdict)
    os._exit(0)


def load_judge() -> Judge:
    """math-verify as a function from a question, LaTeX without `\\boxed{}`, to the word that answers it."""
    from math_verify import LatexExtractionConfig, grader, parse, verify

    logging.disable(logging.CRITICAL)
    grader.sympy_numeric_eq = _guarded(grader.sympy_numeric_eq)
    # Only the box: the looser extraction would fish a number out of "??? 5".
    targets = [LatexExtractionConfig(boxed_match_priority=0)]

    def judge(question: list[str]) -> bytes:
        parsed = [parse(f"\\boxed{{{text}}}", targets, parsing_timeout=None) for text in question]
        if len(parsed) == 1:  # text that is no mathematics comes back as nothing but text
            return UNREADABLE if all(isinstance(part, str) for part in parsed[0]) else READABLE
        answer, gold = parsed
        return EQUAL if verify(gold, answer, timeout_seconds=None) else DIFFERENT

    return judge


def _guarded(numeric_eq: Callable[..., bool]) -> Callable[..., bool]:
    """math-verify's numeric comparison, but not blind to small numbers.

    It rounds or chops differences to an absolute precision, so that 1/2004! equals 1/2006! and 1/2^99 equals
    1/2^98 to it. Here the numbers must also be close in relation to their size; symbols stand for
    themselves by arbitrary values.
    """
    from sympy import Expr, Float, N, Rational, UnevaluatedExpr

    def far_apart(a: Any, b: Any) -> bool:
        # An UnevaluatedExpr is a percentage, and 9 % equals 9 by intention.
        if (
            not isinstance(a, Expr)
            or not isinstance(b, Expr)
            or a.has(UnevaluatedExpr)
            or b.has(UnevaluatedExpr)
        ):
            return False
        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        values = {symbol: Rational(17 + 6 * i, 13) for i, symbol in enumerate(symbols)}
        tolerance = 1e-5 if a.has(Float) or b.has(Float) else 1e-12
        a, b = N(a.subs(values), 30), N(b.subs(values), 30)
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            return False
        return bool(abs(a - b) > tolerance * max(abs(a), abs(b)))

    def guarded(a: Any, b: Any, *precision: int) -> bool:
        return numeric_eq(a, b, *precision) and not far_apart(a, b)

    return guarded


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
