"""Concepts and the words that spell them, and the tokenizer of such a vocabulary.

A concept is a number or one of the signs of `SIGNS`; a language gives each its words, of which any may be
written for it. Every word is one token. Must not know problems, models or training.
"""

import dataclasses
import functools
import json
import math
import pathlib
import random
from collections.abc import Iterable

SPECIAL = ("<unk>", "<end>", "<pad>")  # the first rows of the vocabulary, which are never neighbours
SIGNS = {
    "+": ("plus", "added"),
    "-": ("minus", "less"),
    "*": ("times", "by"),
    "=": ("gives", "makes"),
    ";": ("then", "next"),
    "make": ("reach", "get"),
    ":": ("so", "thus"),
}
_ENGLISH = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_ENGLISH_TENS = dict(
    enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
)
_GERMAN = [
    "null",
    "eins",
    "zwei",
    "drei",
    "vier",
    "fuenf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwoelf",
    "dreizehn",
    "vierzehn",
    "fuenfzehn",
    "sechzehn",
    "siebzehn",
    "achtzehn",
    "neunzehn",
]
_GERMAN_TENS = dict(
    enumerate(["zwanzig", "dreissig", "vierzig", "fuenfzig", "sechzig", "siebzig", "achtzig", "neunzig"], 2)
)


@dataclasses.dataclass(frozen=True)
class Language:
    """The words of each concept; a word belongs to one concept alone."""

    words: dict[str, tuple[str, ...]]

    @functools.cached_property
    def concepts(self) -> dict[str, str]:
        """The concept of each word."""
        return {word: concept for concept, words in self.words.items() for word in words}

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The special tokens, then every word: a token's id is its place."""
        return (*SPECIAL, *self.concepts)

    def write(self, concepts: Iterable[str], rng: random.Random) -> str:
        """A text that spells each concept by any of its words."""
        return " ".join(rng.choice(self.words[concept]) for concept in concepts)

    def read(self, text: str) -> list[str]:
        """The concepts of a text; a word that is none is kept."""
        return [self.concepts.get(word, word) for word in text.split()]


def symbols(largest: int) -> Language:
    """Numbers from 0 to `largest` in digits, and the signs as they are: one word a concept."""
    return Language({concept: (concept,) for concept in (*map(str, range(largest + 1)), *SIGNS)})


def synonyms(largest: int, share: float) -> Language:
    """Numbers from 0 to `largest` and the signs in words: four words a concept, for a `share` of the
    concepts.

    Two are of one root and two of another, each in small letters and with a capital; the remaining concepts
    have the first of these alone. Which ones have four is drawn once for all shares, so that a larger share
    has those of a smaller one.
    """
    roots = {str(n): (english(n), german(n)) for n in range(largest + 1)} | SIGNS
    order = sorted(roots)
    random.Random(0).shuffle(order)
    rich = set(order[: math.ceil(share * len(order))])
    four = {name: (a, a.capitalize(), b, b.capitalize()) for name, (a, b) in roots.items()}
    return Language({name: words if name in rich else words[:1] for name, words in four.items()})


def english(number: int) -> str:
    """A number below 100 as one English word."""
    if number < 20:
        return _ENGLISH[number]
    tens, ones = divmod(number, 10)
    return _ENGLISH_TENS[tens] + (f"-{_ENGLISH[ones]}" if ones else "")


def german(number: int) -> str:
    """A number below 100 as one German word, in letters without dots."""
    if number < 20:
        return _GERMAN[number]
    tens, ones = divmod(number, 10)
    return (f"{'ein' if ones == 1 else _GERMAN[ones]}und" if ones else "") + _GERMAN_TENS[tens]


def write_tokenizer(language: Language, directory: pathlib.Path) -> None:
    """The files of a tokenizer with a token for each word, as a Hugging Face directory has them."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    ids = {word: at for at, word in enumerate(language.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = dict(zip(("unk_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
