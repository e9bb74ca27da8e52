"""What rollouts need of a tokenizer: stop ids, the end of thinking, rows that may be neighbours."""

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
    """What the tokenizer says: how responses stop, when mixing ends, which rows may be neighbours."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    mixing: Mixing
    usable_V: np.ndarray
    spelling_V: np.ndarray | None  # rows of equal entries are no neighbours of one another

    @functools.cached_property
    def eligible(self) -> Eligible:
        """Which rows may be whose neighbours; ValueError where that leaves some row too few."""
        return eligible_rows(len(self.usable_V), self.mixing.k, self.usable_V, self.spelling_V)


def make_tokenizer_info(tokenizer: Any, config: ModelConfig, settings: Settings) -> TokenizerInfo:
    """Reads off the tokenizer what rollouts need; ValueError where k is larger than the usable vocabulary."""
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
            tokenizer_info.eligible  # noqa: B018  (found once, here, and kept)
        except ValueError as error:
            raise UserError(f"mixing.{error}; lower mixing.k or unset mixing.distinct_spelling.") from None
    return tokenizer_info
