"""N-GRPO in JAX: reinforcement learning of reasoning language models with neighbour-mixed rollouts.

A prompt becomes trajectories (`rollout`), trajectories get rewards (`tasks`), rewarded trajectories
become an update (`learner`). `train.py` is the only place that knows this ring; docs/architecture.md
is the map. Nothing is imported here, so that a grading worker does not pay for JAX.

Dimension letters that end a name:

    B  sequences, or slots      T  time (tokens of a row)     C  candidates in a mixture
    V  vocabulary rows          D  model width                L  layers
    N  query heads              K  key/value heads            H  head size
    F  feed-forward width       S  cache length               P  prompts
    G  samples of a prompt (the group)                        R  packed rows
    M  microbatches of one call of the learner

A letter that a file needs for itself, new or with another meaning, is said in that file's docstring or in the
function's that has it. A digit is a size that is written out, a small letter a part of what its capital is.
"""
