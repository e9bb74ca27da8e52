"""What a rollout needs of a tokenizer: stop ids, the ids that end mixing, which tokens may be neighbours.

Owns how settings and a tokenizer become ids and masks. Must not know prompts or responses.
"""

import dataclasses
from typing import Any

import numpy as np

from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors.eligibility import Eligible, eligible_rows
from ngrpo_jax.errors import explained
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.settings import Settings
from ngrpo_jax.tasks import prompts


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer, and what a rollout needs of it.

    Attributes:
      stop_ids: the ids that end a response.
      mixing: the settings of mixing, with ids in the place of texts.
      eligible: which tokens may be neighbours of which.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    mixing: Mixing
    eligible: Eligible


def make_tokenizer_info(tokenizer: Any, config: ModelConfig, settings: Settings) -> TokenizerInfo:
    """Ids and masks from the tokenizer; UserError where a token has fewer neighbours than `mixing.k` needs.

    Special tokens, unused rows of the vocabulary and tokens kept out of mixing are neighbours of no token.
    """
    rows, mixing = config.vocab_size, settings.mixing
    usable_V = prompts.usable_rows(tokenizer, rows)
    keep_out_ids: tuple[int, ...] = ()
    if mixing.active and mixing.keep_out is not None:
        kept_out_V = prompts.matching_rows(tokenizer, mixing.keep_out, rows)
        keep_out_ids = tuple(np.flatnonzero(kept_out_V).tolist())
        usable_V &= ~kept_out_V
    spelling_V = prompts.spelling_groups(tokenizer, rows) if mixing.distinct_spelling else None
    remedy = "lower mixing.k, or loosen mixing.keep_out or mixing.distinct_spelling."
    with explained(ValueError, f"mixing.k is {mixing.k}", remedy):
        eligible = eligible_rows(rows, mixing.k if mixing.active else 1, usable_V, spelling_V)
    until = prompts.until_ids(tokenizer, mixing.until) if mixing.until else ()
    stop_ids = prompts.stop_ids(tokenizer, config.eos_token_ids, settings.data.stop)
    return TokenizerInfo(tokenizer, stop_ids, mixing.method(until, keep_out_ids), eligible)
