"""What is asked of a rollout: a request, which its programs are compiled for, and the sequences it is run on.

Owns both types and the refusal of values that cannot be right. Must not know devices' memory, how slots are
scheduled, or what responses are for. Requests of training, evaluation and preflight are made in
setup/policy.py alone, so that what is compiled ahead is what is run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.errors import require
from ngrpo_jax.model.config import ModelConfig

NO_MIXING = Mixing(strategy="none")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a token is sampled and when a response ends.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding, whose log-probabilities are those of temperature
        1, since a distribution with all its mass on one token has none to record.
      top_p: nucleus of the distribution that top_k has left, renormalised; 1 keeps every token.
      top_k: number of most probable tokens that are kept; 0 keeps every token.
      mixing: what is done to inputs.
      stop_ids: tokens that end a response; may be empty.

    Raises UserError for values that cannot be right.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    mixing: Mixing = NO_MIXING
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0,
            f"temperature {self.temperature} must be 0 or above, top_p {self.top_p} in (0, 1], "
            f"top_k {self.top_k} 0 or above.",
        )
        require(
            self.temperature > 0 or not self.mixing.mixes,
            "temperature is 0 with mixing on; the weights of a mixture need a temperature above 0.",
        )


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """A rollout but for its parameters and sequences: everything that its compiled programs depend on.

    Attributes:
      config: of the model; `config.dtype` is the dtype of matrix products and of the cache.
      sampling: how tokens are sampled.
      samples: responses to each prompt.
      max_new_tokens: bound on the tokens of a response.
      slots: sequences decoded side by side.
      chunk: decode steps between two insertions of new sequences.
      max_prompt_tokens: bound on the tokens of a prompt.
      sharding: of arrays whose leading dimension is the slots; parameters are on the same devices. None: one
        device.
      attention: of a decode step, as `InferenceModel` has it.
      lookahead: chunks that are started before the results of an earlier one are read; None: 0 on CPU, where
        host and device share the cores, else 1.

    Raises UserError for values that cannot be right.
    """

    config: ModelConfig
    sampling: SamplingParams
    samples: int
    max_new_tokens: int
    slots: int
    chunk: int
    max_prompt_tokens: int
    sharding: jax.sharding.NamedSharding | None = None
    attention: str = "auto"
    lookahead: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "slots", "chunk", "max_prompt_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be 1 or more.")
        for stop in self.sampling.stop_ids:
            require(
                0 <= stop < self.config.vocab_size,
                f"stop id {stop} lies outside the vocabulary of {self.config.vocab_size} rows.",
            )


class Sequences(NamedTuple):
    """What the B = prompts × samples sequences of a rollout begin with, prompt-major.

    Attributes:
      prompts: token ids, ragged, none empty.
      keys_B2: uint32 key data of each sequence.
      limits_B: int, bound on the tokens of each response.
    """

    prompts: Sequence[Sequence[int]]
    keys_B2: np.ndarray
    limits_B: np.ndarray


def make_sequences(
    request: RolloutRequest, prompts: Sequence[Sequence[int]], keys_B: Any, limits_B: Any | None = None
) -> Sequences:
    """The sequences of a request, checked.

    Args:
      keys_B: one key a sequence: typed keys, or their uint32 data.
      limits_B: bound of each response, from 1 to max_new_tokens; None: max_new_tokens for all.

    Raises:
      UserError: no prompt, an empty one, one that is too long or holds a token outside of the vocabulary;
        keys or bounds that are not one for each sequence.
    """
    require(len(prompts) > 0, "prompts is empty; a rollout needs at least one.")
    for index, prompt in enumerate(prompts):
        _check_prompt(request, index, prompt)
    count, longest = len(prompts) * request.samples, request.max_new_tokens
    limits_B = np.full(count, longest) if limits_B is None else np.asarray(limits_B)
    require(
        limits_B.shape == (count,) and limits_B.min() >= 1 and limits_B.max() <= longest,
        f"lengths_B must hold a number from 1 to max_new_tokens = {longest} for each of the {count} "
        "sequences.",
    )
    if jax.dtypes.issubdtype(getattr(keys_B, "dtype", None), jax.dtypes.prng_key):
        keys_B = jax.random.key_data(keys_B)
    keys_B2 = np.asarray(keys_B)
    require(
        keys_B2.shape == (count, 2) and keys_B2.dtype == np.uint32,
        f"keys_B must hold one key for each of the {count} sequences; got shape {keys_B2.shape}.",
    )
    return Sequences(prompts, keys_B2, limits_B)


def _check_prompt(request: RolloutRequest, index: int, prompt: Sequence[int]) -> None:
    longest, rows = request.max_prompt_tokens, request.config.vocab_size
    require(len(prompt) > 0, f"prompt {index} is empty; it needs at least one token.")
    require(
        len(prompt) <= longest,
        f"prompt {index} has {len(prompt)} tokens, but the cache has room for {longest}; leave it out or "
        "raise max_prompt_tokens.",
    )
    require(
        min(prompt) >= 0 and max(prompt) < rows,
        f"prompt {index} holds a token outside the vocabulary of {rows} rows.",
    )
