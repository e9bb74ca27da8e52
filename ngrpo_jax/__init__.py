"""N-GRPO in JAX: reinforcement learning of reasoning language models with neighbour-mixed rollouts.

A prompt becomes trajectories (`rollout`), trajectories get rewards (`tasks`), rewarded trajectories
become an update (`learner`). `run/step.py` is the only place that has this ring; docs/architecture.md
is the map. A name of `__all__` is imported when it is first used (docs/library.md), and nothing before, so
that a grading process starts without JAX.

Dimension letters that end a name:

    B  sequences, or slots      T  time (tokens of a row)     C  candidates in a mixture
    V  vocabulary rows          D  model width                L  layers
    N  query heads              K  key/value heads            H  head size
    F  feed-forward width       S  cache length               P  prompts
    G  samples of a prompt (the group)                        R  packed rows
    M  microbatches of one call of the learner

The docstring of a file or of a function declares any further letter that it uses. A digit is a size written
out: keys_B2 has 2 columns. A small letter is a part of what its capital is: `logits_BtV` are
those of a chunk of T.
"""

import importlib
from typing import Any

_WHERE = {
    "load": "model.hf",
    "save": "model.hf",
    "load_tokenizer": "tasks.prompts",
    "encode_prompt": "tasks.prompts",
    "Mixing": "algo.mixture",
    "neighbor_table": "algo.neighbors",
    "generate": "rollout.engine",
    "math_reward": "tasks.rewards",
    "response_text": "library",
    "mixed_tokens": "library",
    "grpo_loss": "library",
    "ObjectiveSettings": "settings",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
