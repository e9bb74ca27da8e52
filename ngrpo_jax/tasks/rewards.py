r"""Response text to reward: the built-in rewards, a user's reward, and the grader that runs them on batches.

Most verdicts need reading alone (`grading.plain`). The rest goes to grading processes (`workers`), because
algebra can run for minutes or take gigabytes on what a model writes: each process has a memory limit and, for
each question, a deadline that the kernel enforces. The processes are programs of their own rather than
children of `multiprocessing`, which would either fork JAX's threads or import the parent's main module, and
with it JAX, again. Must not know tokens or models.
"""

import dataclasses
import functools
import os
import queue
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ngrpo_jax.choices import LEAST_GRADER_MB
from ngrpo_jax.errors import UserError

from .grading import process
from .grading.extraction import after_thinking, choice_letter, gold_letter, last_boxed, last_number
from .grading.plain import quick_verdict
from .grading.process import Reply
from .user_reward import Reward, load_reward
from .workers import Worker

__all__ = ["Counts", "Grader", "Verdict", "choice_reward", "last_number_reward", "load_reward", "math_reward"]

_CACHED_REPLIES = 16_384
PLAIN, NO_BOX = "plain", "no box"
# How verdicts are reached, and the count of each.
WAYS = {
    PLAIN: "plain",
    process.RULE: "rule",
    process.ALGEBRA: "algebra",
    NO_BOX: "no_box",
    process.UNREADABLE_GOLD: "unreadable_gold",
    process.TIMEOUT: "timeouts",
    process.FAILED: "failures",
}


def math_reward(response: str, gold: str) -> float:
    r"""1.0 if the last closed `\boxed{}` after the last `</think>` equals `gold`, else 0.0; never raises.

    The first question that reading alone does not decide starts a grading process, which is then kept.
    """
    return _shared_grader(os.getpid()).grade([response], [gold], "math")[0]


def choice_reward(response: str, gold: str) -> float:
    """1.0 if the last `Answer: X` after the last `</think>` is the letter `gold`, else 0.0; never raises."""
    letter = choice_letter(after_thinking(response))
    return float(letter is not None and letter == gold_letter(gold))


def last_number_reward(response: str, gold: str) -> float:
    """1.0 if the last number of the response is `gold`, else 0.0: for models that were never taught to box.

    Used by its import path, `ngrpo_jax.tasks.rewards:last_number_reward`, as a reward of the user's would be.
    """
    number = last_number(after_thinking(response))
    return float(number is not None and quick_verdict(number, gold) is True)


class Verdict(NamedTuple):
    """A verdict on a response and how it was reached.

    answer: the text in the box; None without a box.
    way: a key of `WAYS`.
    rule: the rule of comparison that decided, where a grading process compared by sorts.
    answer_sort, gold_sort: see `grading.sorts`.
    """

    equal: bool
    way: str
    answer: str | None = None
    rule: str = ""
    answer_sort: str = ""
    gold_sort: str = ""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a `Grader` has done: how many responses, and how the verdicts on mathematics were reached."""

    graded: int = 0
    plain: int = 0  # equal spelling, or plain numbers
    rule: int = 0  # by the sorts of answer and gold alone
    algebra: int = 0  # by values of expressions
    no_box: int = 0
    unreadable_gold: int = 0  # not equal, as the gold cannot be read
    timeouts: int = 0  # past the deadline: 0.0
    failures: int = 0  # out of memory, or an error: 0.0
    cached: int = 0  # of these, the same answer to the same gold as before
    seconds: float = 0.0  # inside of `grade`

    @property
    def by_way(self) -> dict[str, int]:
        """Responses by the way of their verdict; 0 of each for a user's reward and for multiple choice."""
        names = ("plain", "rule", "algebra", "no_box", "unreadable_gold")
        return {name: getattr(self, name) for name in names} | {"no_verdict": self.timeouts + self.failures}

    @property
    def per_second(self) -> float:
        """Verdicts a second of grading; 0.0 before the first."""
        return self.graded / self.seconds if self.seconds > 0 else 0.0

    def plus(self, other: "Counts", sign: int = 1) -> "Counts":
        """The sum of two counts, or with sign -1 their difference."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(a + sign * b for a, b in zip(mine, theirs, strict=True)))

    def since(self, earlier: "Counts") -> "Counts":
        """What has been done since `earlier`, as for one batch."""
        return self.plus(earlier, -1)


class Grader:
    """Grades batches of responses on `workers` processes.

    Args:
      workers: processes at most; entered as a context manager it starts all of them at once in the
        background, else each is started when first needed.
      deadline_s: wall-clock seconds for one question; then the reward is 0.0.
      memory_mb: address space of one process, in MiB.
    Raises UserError for arguments out of range. Safe to call from several threads.
    """

    def __init__(self, workers: int = 2, deadline_s: float = 5.0, memory_mb: int = 1024):
        if workers < 1 or deadline_s <= 0 or memory_mb < LEAST_GRADER_MB:
            raise UserError(
                f"grading needs at least 1 worker, a deadline above 0 s and {LEAST_GRADER_MB} MiB, not "
                f"{workers}, {deadline_s} and {memory_mb}"
            )
        self.counts = Counts()
        self._lock = threading.Lock()
        self._replies: OrderedDict[tuple[str, str], Reply] = OrderedDict()
        self._workers = [Worker(deadline_s, memory_mb) for _ in range(workers)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()  # the last used first: few are ever started
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")
        self._rewards: dict[str, Reward] = {}
        self._finalizer = weakref.finalize(self, _stop, self._threads, self._workers)

    def __enter__(self) -> "Grader":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes; happens by itself when the interpreter ends."""
        self._finalizer()

    def grade(
        self, responses: Sequence[str], golds: Sequence[str], kind: str, ids: Sequence[str] | None = None
    ) -> list[float]:
        """The reward of each response, in order.

        Args:
          kind: "math", "choice", or the import path of a user's reward, which runs in this process.
          ids: of the responses, for the sentence about a user's reward that fails; by default their numbers.
        Raises UserError for an unknown kind and for a user's reward that fails, RuntimeError where no process
        can be started.
        """
        if kind == "math":
            return [float(verdict.equal) for verdict in self.verdicts(responses, golds)]
        started = time.perf_counter()
        if kind == "choice":
            rewards = [choice_reward(response, gold) for response, gold in zip(responses, golds, strict=True)]
        else:
            reward = self._user_reward(kind)
            names = ids if ids is not None else [f"number {i}" for i in range(1, len(responses) + 1)]
            rewards = [reward(*triple) for triple in zip(responses, golds, names, strict=True)]
        self._count(Counts(graded=len(rewards), seconds=time.perf_counter() - started))
        return rewards

    def verdicts(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """The verdict on each response as mathematics, in order; errors as for `grade`."""
        started = time.perf_counter()
        verdicts: list[Verdict | None] = []
        open_at: dict[tuple[str, str], list[int]] = {}
        for i, (response, gold) in enumerate(zip(responses, golds, strict=True)):
            answer = last_boxed(after_thinking(response))
            gold = last_boxed(gold) or gold  # a gold may be given with its box
            equal = None if answer is None else quick_verdict(answer, gold)
            if answer is None:
                verdicts.append(Verdict(False, NO_BOX))
            elif equal is not None:
                verdicts.append(Verdict(equal, PLAIN, answer))
            else:
                verdicts.append(None)
                open_at.setdefault((answer, gold), []).append(i)
        cached = sum(map(len, open_at.values())) - len(open_at)
        for question, (reply, known) in zip(open_at, self._threads.map(self._decide, open_at), strict=True):
            cached += known
            for i in open_at[question]:
                equal, way, rule, answer_sort, gold_sort = reply
                verdicts[i] = Verdict(equal, way, question[0], rule, answer_sort, gold_sort)
        done = [verdict for verdict in verdicts if verdict is not None]
        counted = Counter(verdict.way for verdict in done)
        ways = {name: counted[way] for way, name in WAYS.items()}
        seconds = time.perf_counter() - started
        self._count(Counts(graded=len(done), cached=cached, seconds=seconds, **ways))
        return done

    def snapshot(self) -> Counts:
        """The counts as they are now, for `Counts.since`."""
        return self.counts

    def check(self, kind: str) -> None:
        """Raises UserError for a kind that `grade` would refuse, before there is anything to grade."""
        if kind not in ("math", "choice"):
            self._user_reward(kind)

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Whether each gold answer can be read within the deadline."""
        questions = [(last_boxed(gold) or gold,) for gold in golds]
        return [reply.equal for reply in self._threads.map(self._ask, questions)]

    def _count(self, counts: Counts) -> None:
        with self._lock:
            self.counts = self.counts.plus(counts)

    def _user_reward(self, kind: str) -> Reward:
        if ":" not in kind:
            raise UserError(
                f"unknown reward {kind!r}; it is math, choice, or an import path package.module:function"
            )
        if kind not in self._rewards:
            self._rewards[kind] = load_reward(kind)
        return self._rewards[kind]

    def _decide(self, question: tuple[str, str]) -> tuple[Reply, bool]:
        """The reply to one question, and whether it was known; time-outs and failures are asked anew."""
        with self._lock:
            if question in self._replies:
                self._replies.move_to_end(question)
                return self._replies[question], True
        reply = self._ask(question)
        if reply.way not in (process.TIMEOUT, process.FAILED):
            with self._lock:
                self._replies[question] = reply
                if len(self._replies) > _CACHED_REPLIES:
                    self._replies.popitem(last=False)
        return reply, False

    def _ask(self, question: tuple[str, ...]) -> Reply:
        """The reply of an idle process."""
        worker = self._idle.get()
        try:
            return worker.ask(question)
        finally:
            self._idle.put(worker)


def _stop(threads: ThreadPoolExecutor, workers: Sequence[Worker]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.stop()


_shared_lock = threading.Lock()


def _shared_grader(process_id: int) -> Grader:
    """The grader of `math_reward`; a forked process must not use its parent's pipes, hence the id."""
    with _shared_lock:
        return _make_shared_grader(process_id)


@functools.lru_cache(maxsize=1)
def _make_shared_grader(process_id: int) -> Grader:
    return Grader(workers=min(4, os.cpu_count() or 1))
