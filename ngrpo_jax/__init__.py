"""N-GRPO in JAX: reinforcement learning of reasoning language models with neighbour-mixed rollouts.

A prompt becomes trajectories (`rollout`), trajectories get rewards (`tasks`), rewarded trajectories
become an update (`learner`). `run/step.py` is the only place that has this ring; docs/architecture.md
is the map. Nothing is imported here, so that a grading process starts without JAX.

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
