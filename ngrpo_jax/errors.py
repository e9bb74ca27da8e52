"""The exceptions of the program that end a command in a known way."""

from __future__ import annotations

import signal


class Preempted(Exception):
    """All processes of a run have agreed to stop after a step, because one of them got a signal."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; the run goes on from step {step}.")
        self.signal = number
