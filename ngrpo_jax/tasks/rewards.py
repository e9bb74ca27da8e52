r"""Response text to score: the rewards, and the processes that do the algebra.

Most verdicts fall here, by reading alone (`grading`). What takes algebra goes to worker processes
(`workers`, `math_worker`), because math-verify can run for minutes or take gigabytes on what a model writes:
each has a memory limit and, for each question, a deadline at which the kernel ends it. The workers are
scripts of their own rather than `multiprocessing` children, which would either fork JAX's threads or import
the parent's main module, and with it JAX, again. Nothing here knows tokens or models.
"""

import dataclasses
import functools
import math
import os
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ngrpo_jax.choices import LEAST_GRADER_MB
from ngrpo_jax.errors import UserError

from . import math_worker
from .grading import (
    after_thinking,
    choice_letter,
    gold_letter,
    last_boxed,
    last_number,
    quick_verdict,
    to_latex,
)
from .importing import import_function
from .workers import Worker

Reward = Callable[[str, str], float]

_CACHED_VERDICTS = 16_384


def math_reward(response: str, gold: str) -> float:
    r"""1.0 if the last closed `\boxed{}` after the last `</think>` equals `gold`, else 0.0; never raises.

    The first question that takes algebra starts a worker, which is then kept.
    """
    return _shared_grader(os.getpid()).grade([response], [gold], "math")[0]


def choice_reward(response: str, gold: str) -> float:
    """1.0 if the last `Answer: X` after the last `</think>` is the letter `gold`, else 0.0; never raises."""
    letter = choice_letter(after_thinking(response))
    return float(letter is not None and letter == gold_letter(gold))


def last_number_reward(response: str, gold: str) -> float:
    """1.0 if the last number of the response is `gold`, else 0.0: for models that were never taught to box.

    Used by its import path, `ngrpo_jax.tasks.rewards:last_number_reward`, as a reward of one's own would be.
    """
    number = last_number(after_thinking(response))
    return float(number is not None and quick_verdict(number, gold) is True)


def load_reward(path: str) -> Reward:
    """A user's reward, "package.module:function", as a checked callable (response, gold) -> float.

    Raises ValueError where it cannot be imported; the callable raises ValueError where the function's value
    is no finite number. What the function itself raises is passed on: it is the user's to see.
    """
    function = import_function(path, "the reward")

    def reward(response: str, gold: str) -> float:
        value = function(response, gold)
        try:
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"the reward {path!r} gave {value!r}, which is no finite number")
        return score

    return reward


@dataclasses.dataclass
class Counts:
    """What a `Grader` has done: how many responses, and how they were decided."""

    graded: int = 0
    by_rule: int = 0  # by reading alone, or by a user's reward
    cached: int = 0  # the same answer to the same gold, decided before
    timeouts: int = 0  # past the deadline: 0.0
    failures: int = 0  # out of memory, a dead worker, or text that math-verify cannot compare: 0.0
    seconds: float = 0.0  # inside `score`

    @property
    def per_second(self) -> float:
        """Verdicts a second of grading; 0.0 before the first."""
        return self.graded / self.seconds if self.seconds > 0 else 0.0

    def since(self, earlier: "Counts") -> "Counts":
        """What has been done since `earlier`, as for one batch."""
        names = [field.name for field in dataclasses.fields(self)]
        return Counts(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


class Grader:
    """Scores batches of responses on `workers` processes.

    Args:
      workers: processes at most; entered as a context manager it starts all of them at once in the
        background, else each is started when first needed.
      deadline_s: wall-clock seconds for one question; then its worker is killed and the score is 0.0.
      memory_mb: address space of one worker, in MiB.
    Raises ValueError for arguments out of range. Safe to call from several threads.
    """

    def __init__(self, workers: int = 2, deadline_s: float = 5.0, memory_mb: int = 1024):
        if workers < 1 or deadline_s <= 0 or memory_mb < LEAST_GRADER_MB:
            raise UserError(
                f"grading needs at least 1 worker, a deadline above 0 s and {LEAST_GRADER_MB} MiB, not "
                f"{workers}, {deadline_s} and {memory_mb}"
            )
        self.counts = Counts()
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[tuple[str, str], bool] = OrderedDict()
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
        """Stop the workers; happens by itself when the interpreter ends."""
        self._finalizer()

    def grade(self, responses: Sequence[str], golds: Sequence[str], kind: str) -> list[float]:
        """The score of each response, in order.

        `kind` is "math", "choice", or the import path of a user's reward, which runs in this process.
        Raises ValueError for an unknown kind and RuntimeError where no worker can be started.
        """
        started = time.perf_counter()
        if kind == "math":
            scores = self._score_math(responses, golds)
        else:
            reward = choice_reward if kind == "choice" else self._user_reward(kind)
            scores = [reward(response, gold) for response, gold in zip(responses, golds, strict=True)]
            with self._lock:
                self.counts.by_rule += len(scores)
        with self._lock:
            self.counts.graded += len(scores)
            self.counts.seconds += time.perf_counter() - started
        return scores

    def snapshot(self) -> Counts:
        """The counts as they stand, for `Counts.since`."""
        with self._lock:
            return dataclasses.replace(self.counts)

    def check(self, kind: str) -> None:
        """Raises ValueError for a kind that `score` would refuse, before there is anything to score."""
        if kind not in ("math", "choice"):
            self._user_reward(kind)

    def _user_reward(self, kind: str) -> Reward:
        if ":" not in kind:
            raise UserError(
                f"unknown reward {kind!r}; it is math, choice, or an import path package.module:function"
            )
        if kind not in self._rewards:
            self._rewards[kind] = load_reward(kind)
        return self._rewards[kind]

    def _score_math(self, responses: Sequence[str], golds: Sequence[str]) -> list[float]:
        verdicts: list[bool] = []
        open_at: dict[tuple[str, str], list[int]] = {}
        for i, (response, gold) in enumerate(zip(responses, golds, strict=True)):
            answer = last_boxed(after_thinking(response))
            # A gold answer may be given with its box.
            gold = last_boxed(gold) or gold
            verdict = answer is not None and quick_verdict(answer, gold)
            if verdict is None:
                open_at.setdefault((to_latex(answer or ""), to_latex(gold)), []).append(i)
            verdicts.append(bool(verdict))
        questions = list(open_at)
        for question, verdict in zip(questions, self._threads.map(self._decide, questions), strict=True):
            for i in open_at[question]:
                verdicts[i] = verdict
        asked = sum(map(len, open_at.values()))
        with self._lock:
            self.counts.by_rule += len(verdicts) - asked
            self.counts.cached += asked - len(questions)
        return [float(verdict) for verdict in verdicts]

    def _decide(self, question: tuple[str, str]) -> bool:
        """One question, from memory or from an idle worker; time-outs and failures are not remembered."""
        with self._lock:
            if question in self._verdicts:
                self.counts.cached += 1
                self._verdicts.move_to_end(question)
                return self._verdicts[question]
        reply = self._ask(question)
        equal = reply == math_worker.EQUAL
        with self._lock:
            self.counts.timeouts += reply == math_worker.TIMEOUT
            self.counts.failures += reply == math_worker.FAILED
            if equal or reply == math_worker.DIFFERENT:
                self._verdicts[question] = equal
                if len(self._verdicts) > _CACHED_VERDICTS:
                    self._verdicts.popitem(last=False)
        return equal

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Whether math-verify finds mathematics in each gold answer within the deadline."""
        questions = [(to_latex(last_boxed(gold) or gold),) for gold in golds]
        return [reply == math_worker.READABLE for reply in self._threads.map(self._ask, questions)]

    def _ask(self, question: tuple[str, ...]) -> bytes:
        """An idle worker's reply."""
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
    """The grader of `math_reward`; a forked process must not talk over its parent's pipes, hence the id."""
    with _shared_lock:
        return _make_shared_grader(process_id)


@functools.lru_cache(maxsize=1)
def _make_shared_grader(process_id: int) -> Grader:
    return Grader(workers=min(4, os.cpu_count() or 1))
