"""N-GRPO in JAX: reinforcement learning of reasoning language models with neighbour-mixed rollouts.

A prompt becomes trajectories (`rollout`), trajectories get rewards (`tasks`), rewarded trajectories
become an update (`learner`). `train.py` is the only place that knows this ring; docs/architecture.md
is the map. Nothing is imported here, so that a grading worker does not pay for JAX.

Dimension letters that end a name, everywhere in the project:

    B  sequences, or slots      T  time (tokens of a row)     C  candidates in a mixture
    V  vocabulary rows          D  model width                L  layers
    N  query heads              K  key/value heads            H  head size
    F  feed-forward width       S  cache length               P  prompts
    G  samples of a prompt (the group)                        R  packed rows
"""
