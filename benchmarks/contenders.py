"""The two sides of a rollout race, on the same weights, prompts and response lengths.

Ours is `engine.generate`; theirs is a peer that takes the requests of peers/hf_generate.py.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peer import Peer
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import engine

SAMPLES = 4  # responses a prompt
GREEDY_NEW = 16  # tokens a response that both sides must agree on before they race


class Model(NamedTuple):
    """What all cases run on: sizes, parameters in the rollout's layout, and the directory a peer loads."""

    config: ModelConfig
    params: Any
    directory: str
    name: str


class Work(NamedTuple):
    """Prompts, and how many tokens each response shall have."""

    prompts: list[list[int]]
    lengths_B: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.lengths_B.sum())


class Ours:
    """A run of the engine; keeps the last run's figures and every run's decode seconds."""

    def __init__(self, model: Model, work: Work, slots: int, chunk: int) -> None:
        self._model, self._work, self._slots, self._chunk = model, work, slots, chunk
        self._seed, self.decode_s = 0, []
        self.stats: engine.RolloutStats = engine.RolloutStats()

    def __call__(self) -> float:
        self._seed += 1
        self.stats = engine.RolloutStats()
        start = time.perf_counter()
        written = _generate(
            self._model, self._work, 1.0, self._seed, slots=self._slots, chunk=self._chunk, stats=self.stats
        )
        seconds = time.perf_counter() - start
        if not np.array_equal(written.lengths_B, self._work.lengths_B):
            raise RuntimeError("the engine did not write the number of tokens that was asked for")
        self.decode_s.append(self.stats.decode_s)
        return seconds


class Theirs:
    """A run of the peer; keeps the decode steps that it took, where it tells them."""

    def __init__(self, peer: Peer, work: Work, batch: int) -> None:
        self._peer, self._work, self._batch = peer, work, batch
        self._seed = 0
        self.steps: int | None = None

    def __call__(self) -> float:
        self._seed += 1
        answer = _ask(self._peer, self._work, self._batch, 1.0, self._seed)
        self.steps = answer["steps"]
        return answer["seconds"]


def agreement(model: Model, peer: Peer, work: Work) -> str:
    """Whether both sides write the same tokens where chance has no part: the same weights, the same work."""
    short = Work(work.prompts, np.full(len(work.prompts), GREEDY_NEW, np.int32))
    ours = _generate(model, short, 0.0, 0, samples=1, slots=len(work.prompts))
    theirs = _ask(peer, short, len(work.prompts), 0.0, 0, samples=1, tokens=True)["responses"]
    same = int((ours.tokens_BT == np.array(theirs)).sum())
    return f"Greedy tokens that both sides agree on: {same} of {short.tokens}."


def _generate(
    model: Model, work: Work, temperature: float, seed: int, *, samples: int = SAMPLES, **options: Any
) -> Any:
    return engine.generate(
        model.params,
        model.config,
        work.prompts,
        samples=samples,
        max_new_tokens=int(work.lengths_B.max()),
        lengths_B=work.lengths_B,
        temperature=temperature,
        stop_ids=(),
        seed=seed,
        **options,
    )


def _ask(
    peer: Peer,
    work: Work,
    batch: int,
    temperature: float,
    seed: int,
    *,
    samples: int = SAMPLES,
    tokens: bool = False,
) -> dict[str, Any]:
    return peer.ask(
        "generate",
        prompts=work.prompts,
        samples=samples,
        lengths=work.lengths_B.tolist(),
        batch=batch,
        temperature=temperature,
        seed=seed,
        tokens=tokens,
    )
