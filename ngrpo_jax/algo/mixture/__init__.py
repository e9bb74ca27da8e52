"""Mixtures: the one kind of input that the model takes, and the ways in which the rollout makes them.

inputs.py      the Mixture type and its embedding, the same in rollout and replay
strategies.py  one object for each mixing strategy: what it needs, and the input that it proposes
mixing.py      `Mixing`, the settings of a rollout's inputs; the gate of (11) and the end of mixing

Equation numbers in this package are those of arXiv 2606.10768.
"""

from ngrpo_jax.algo.mixture.inputs import Mixture, Noise, cosine_to_anchor, embed, one_hot
from ngrpo_jax.algo.mixture.mixing import TABLES, TOKENS, WEIGHTS, Mixing, completed, next_input, tail_length
from ngrpo_jax.algo.mixture.strategies import STRATEGIES, Proposal, StepContext, Strategy, neighbor_mixture
