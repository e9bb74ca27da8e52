"""A user's reward function: loaded by its import path, its values checked, its failures one sentence.

Must not know graders. The function runs in the training process.
"""

import inspect
import math
from collections.abc import Callable

from ngrpo_jax.errors import UserError

from .importing import import_function

Reward = Callable[[str, str, str], float]

_LARGEST = (2 - 2**-23) * 2.0**127  # of float32


def load_reward(path: str) -> Reward:
    """The user's function at "package.module:function" as a checked callable (response, gold, id) -> float.

    The function itself is called with response and gold; the response's id is for the sentence of an error.
    Raises UserError where the function cannot be imported. The callable raises UserError where the function
    raises, calls sys.exit, or returns anything but a finite number within float32's range.
    """
    function = import_function(path, "the reward")

    def reward(response: str, gold: str, identity: str = "") -> float:
        of = f" of response {identity}" if identity else ""
        try:
            value = function(response, gold)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: it would end the run with a status of its own
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            raise UserError(f"the reward {path!r}{of} failed ({what}); mend it") from error
        if inspect.iscoroutine(value):
            value.close()
            raise UserError(f"the reward {path!r}{of} gave a coroutine; define it without async")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise UserError(
                f"the reward {path!r}{of} gave {_shown(value)}, which is no finite number of float32; mend it"
            )
        return number

    return reward


def _shown(value: object) -> str:
    """A value in an error's sentence: one line, not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
