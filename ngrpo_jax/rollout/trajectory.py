"""What a rollout records: enough to grade it, to replay it exactly, and to train on it.

NumPy arrays on the host; the learner, the tasks and the evaluation read them, only the rollout makes them.
"""

from typing import NamedTuple, Self

import jax
import numpy as np

from ngrpo_jax.algo.mixture import Mixture, Noise


class Trajectories(NamedTuple):
    """B responses, prompt-major: the samples of a prompt are consecutive.

    Attributes:
      tokens_BT: int32, the response's tokens; 0 beyond the length.
      lengths_B: int32, response tokens, a stop token included.
      mixtures: ids int32 and weights float32 [B, T, C], the input that stood for each token; with the noise
        strategy also what replays its noise (scale 0 where the token was fed as it is).
      mixed_BT: bool, whether that input was a mixture rather than the token itself.
      logprobs_BT: float32, log-probability of the token when it was sampled, at the rollout temperature,
        before truncation by top-p or top-k; 0 beyond the length.
      stopped_B: bool, whether a stop token ended the response.
      nonfinite_B: bool, whether logits that are not finite ended the response; the tokens before them, which
        may be none, stay. Where neither is true, the response ended at its limit.
    """

    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    mixtures: Mixture
    mixed_BT: np.ndarray
    logprobs_BT: np.ndarray
    stopped_B: np.ndarray
    nonfinite_B: np.ndarray

    @classmethod
    def empty(cls, count: int, length: int, candidates: int, *, noisy: bool = False) -> Self:
        """`count` responses without tokens: token 0, log-probability 0, one-hot 0.

        `noisy`: whether the mixtures carry noise, here of scale 0.
        """
        shape = (count, length)
        noise = None
        if noisy:
            noise = Noise(
                np.zeros((*shape, 2), np.uint32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
            )
        weights_BTC = np.zeros((*shape, candidates), np.float32)
        weights_BTC[..., 0] = 1.0
        return cls(
            tokens_BT=np.zeros(shape, np.int32),
            lengths_B=np.zeros(count, np.int32),
            mixtures=Mixture(np.zeros((*shape, candidates), np.int32), weights_BTC, noise),
            mixed_BT=np.zeros(shape, bool),
            logprobs_BT=np.zeros(shape, np.float32),
            stopped_B=np.zeros(count, bool),
            nonfinite_B=np.zeros(count, bool),
        )

    def response(self, index: int) -> np.ndarray:
        """The tokens of one response, without padding."""
        return self.tokens_BT[index, : self.lengths_B[index]]

    def ended(self, index: int, limit: int) -> bool:
        """Whether a response of at most `limit` tokens has ended."""
        return bool(self.stopped_B[index] or self.nonfinite_B[index] or self.lengths_B[index] >= limit)

    def part(self, start: int, stop: int) -> Self:
        """The responses start..stop."""
        return jax.tree.map(lambda leaf: leaf[start:stop], self)
