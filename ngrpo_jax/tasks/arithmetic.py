"""The arithmetic task: generated problems, their worked solutions, and a small tokenizer for them.

With it a model of a few million parameters learns to reason without a download. Must not know models or
training; `datasets` turns its rows into problems as it does for every source.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import string
from collections.abc import Iterator

from ngrpo_jax.errors import require

THINK_OPENING = "<think>\n"
DEFAULT_SIZE = {"train": 8192, "test": 256}  # of each split

_HELD_OUT_SHARE = 8
_ENUMERABLE = 100_000
_GRAMMAR = "arithmetic:terms=3,digits=2,ops=+- (each part optional; terms may be a range such as 2-4)"
_SYMBOLS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A family of problems: `min_terms`..`max_terms` numbers of at most `digits` digits, joined by `ops`."""

    min_terms: int = 3
    max_terms: int = 3
    digits: int = 2
    ops: str = "+-"

    @property
    def size(self) -> int:
        """How many different problems the family has, both splits together."""
        lengths = range(self.min_terms, self.max_terms + 1)
        return sum(10 ** (self.digits * n) * len(self.ops) ** (n - 1) for n in lengths)


def parse_spec(text: str) -> Spec:
    """The `Spec` of the part after `arithmetic:` in a source, such as "terms=2-4,digits=2,ops=+-".

    Raises UserError, naming the wrong part and the grammar.
    """
    values, fault = {"terms": "3", "digits": "2", "ops": "+-"}, f"data source 'arithmetic:{text}'"
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        require(key in values and bool(equals), f"{fault}: {part!r} is not understood; write {_GRAMMAR}")
        values[key] = value
    terms = re.fullmatch(r"(\d{1,2})(?:-(\d{1,2}))?", values["terms"])
    low, high = (int(terms[1]), int(terms[2] or terms[1])) if terms else (0, 0)
    require(2 <= low <= high, f"{fault}: terms must be a number from 2 or a range as 2-4")
    digits, ops = values["digits"], values["ops"]
    require(digits in tuple("123456789"), f"{fault}: digits must be a number from 1 to 9")
    different_signs = 0 < len(ops) == len(set(ops) & _SYMBOLS.keys())
    require(different_signs, f"{fault}: ops must be different signs out of + - *")
    return Spec(low, high, int(digits), ops)


def generate(spec: Spec, *, split: str, seed: int, size: int | None = None) -> list[dict[str, str]]:
    """Rows {id, problem, answer}, all different, in an order that `seed` alone decides.

    A hash of its text decides whether a problem is in the test split (one in eight is), so that "train" and
    "test" never share a problem, whatever their seeds. A smaller `size` gives a prefix of a larger one; the
    default is `DEFAULT_SIZE`, or the whole family where it is smaller. Raises UserError for an unknown split
    and for a `size` that exceeds the family.
    """
    splits = " and ".join(DEFAULT_SIZE)
    require(split in DEFAULT_SIZE, f"data source 'arithmetic' has the splits {splits}, not {split!r}")
    wanted = DEFAULT_SIZE[split] if size is None else size
    rng = random.Random(f"{seed} {split}")
    small = spec.size <= _ENUMERABLE
    texts: dict[str, None] = {}
    for text in _shuffled(spec, rng) if small else _drawn(spec, rng, attempts=100 * wanted + 10_000):
        if len(texts) >= wanted:
            break
        if _held_out(text) == (split == "test"):
            texts[text] = None
    require(
        len(texts) >= wanted or (size is None and bool(texts)),
        f"data source 'arithmetic' has only {len(texts)} different {split} problems with {spec.digits} "
        f"digits and up to {spec.max_terms} terms, not {wanted}; take fewer, or raise terms or digits",
    )
    return [{"id": f"arithmetic:{t}", "problem": t, "answer": str(steps(t)[-1][1])} for t in texts]


def steps(problem: str) -> list[tuple[str, int]]:
    """The steps of calculating "37+48-15=": [("37+48", 85), ("85-15", 70)].

    Products first, then from left to right. Raises ValueError for text that is not such a problem.
    """
    understood = bool(re.fullmatch(r"\d+([-+*]\d+)+=", problem))
    require(understood, f"{problem!r} is not an arithmetic problem such as '37+48-15='")
    pieces = re.split(r"([-+*])", problem.removesuffix("="))
    numbers, signs = [int(piece) for piece in pieces[::2]], pieces[1::2]
    done = []
    while signs:
        at = signs.index("*") if "*" in signs else 0
        value = _SYMBOLS[signs[at]](numbers[at], numbers[at + 1])
        done.append((f"{numbers[at]}{signs[at]}{numbers[at + 1]}", value))
        numbers[at : at + 2] = [value]
        del signs[at]
    return done


def worked_solution(problem: str) -> str:
    r"""`<think>`, one line a step, `</think>\boxed{answer}`, for a problem's text such as "37+48-15="."""
    done = steps(problem)
    lines = "".join(f"{calculation}={value}\n" for calculation, value in done)
    return f"{THINK_OPENING}{lines}</think>\\boxed{{{done[-1][1]}}}"


def worked_response(problem: str) -> str:
    """The worked solution without its `<think>` line, which the chat template of `make_tokenizer` writes."""
    return worked_solution(problem).removeprefix(THINK_OPENING)


def _held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def _shuffled(spec: Spec, rng: random.Random) -> list[str]:
    """Every problem of a small family in random order: drawing at random would hardly find the last ones."""
    numbers = [str(n) for n in range(10**spec.digits)]
    texts = []
    for terms in range(spec.min_terms, spec.max_terms + 1):
        for parts in itertools.product(numbers, *([spec.ops, numbers] * (terms - 1))):
            texts.append("".join(parts) + "=")
    rng.shuffle(texts)
    return texts


def _drawn(spec: Spec, rng: random.Random, attempts: int) -> Iterator[str]:
    """Random problems of a large family: the number of terms uniform, then numbers and signs uniform."""
    for _ in range(attempts):
        text = str(rng.randrange(10**spec.digits))
        for _ in range(rng.randint(spec.min_terms, spec.max_terms) - 1):
            text += rng.choice(spec.ops) + str(rng.randrange(10**spec.digits))
        yield text + "="


_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
_WHOLE = ("<think>", "</think>", "\\boxed{")
# As in the R1-distill models: the prompt ends in `<think>`, and the response has only `</think>`.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif %}"
)


def make_tokenizer(directory: str | os.PathLike[str]) -> None:
    r"""Write a character tokenizer as a Hugging Face directory (tokenizer.json, tokenizer_config.json).

    One token for each character of `string.printable` and for `<think>`, `</think>` and `\boxed{`; six
    special ones, pad 0, bos 1, eos 2 first; any other character is `<unk>`. 109 tokens, ids without gaps.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *_WHOLE, *string.printable))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _WHOLE])
    target = pathlib.Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")},
        "additional_special_tokens": ["<user>", "<assistant>"],
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
