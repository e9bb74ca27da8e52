"""What a rollout needs of a tokenizer: stop ids, the ids that end mixing, which tokens may be neighbours.

Owns how settings and a tokenizer become ids and masks. Must not know prompts or responses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.neighbors.eligibility import Eligible, eligible_rows
from ngrpo_jax.errors import UserError
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.settings import Settings
from ngrpo_jax.tasks import prompts


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer, and what a rollout needs of it.

    Attributes:
      stop_ids: the ids that end a response.
      mixing: the settings of mixing, with ids in the place of texts.
      usable_V: bool, the tokens that may be neighbours.
      spelling_V: int; tokens with equal entries are not neighbours of one another. None: no such restriction.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    mixing: Mixing
    usable_V: np.ndarray
    spelling_V: np.ndarray | None

    @functools.cached_property
    def eligible(self) -> Eligible:
        """Which tokens may be neighbours of which; ValueError where a token has too few."""
        return eligible_rows(len(self.usable_V), self.mixing.k, self.usable_V, self.spelling_V)


def make_tokenizer_info(tokenizer: Any, config: ModelConfig, settings: Settings) -> TokenizerInfo:
    """Ids and masks from the tokenizer; UserError where fewer tokens than `mixing.k` may be neighbours."""
    rows, mixing = config.vocab_size, settings.mixing
    usable_V = prompts.usable_rows(tokenizer, rows)
    keep_out_ids: tuple[int, ...] = ()
    if mixing.active and mixing.keep_out is not None:
        kept_out_V = prompts.matching_rows(tokenizer, mixing.keep_out, rows)
        keep_out_ids = tuple(np.flatnonzero(kept_out_V).tolist())
        usable_V &= ~kept_out_V
    if mixing.active and mixing.k > usable_V.sum():
        raise UserError(
            f"mixing.k is {mixing.k}, but only {int(usable_V.sum())} rows of the vocabulary can be "
            "neighbours; lower mixing.k" + (", or narrow mixing.keep_out." if keep_out_ids else ".")
        )
    spelling_V = prompts.spelling_groups(tokenizer, rows) if mixing.distinct_spelling else None
    until = prompts.until_ids(tokenizer, mixing.until) if mixing.until else ()
    tokenizer_info = TokenizerInfo(
        tokenizer,
        prompts.stop_ids(tokenizer, config.eos_token_ids),
        mixing.method(until, keep_out_ids),
        usable_V,
        spelling_V,
    )
    if mixing.active and spelling_V is not None:
        try:
            tokenizer_info.eligible  # noqa: B018  (computed here, so that an error is found before the run)
        except ValueError as error:
            raise UserError(f"mixing.{error}; lower mixing.k or unset mixing.distinct_spelling.") from None
    return tokenizer_info
