r"""Text to token ids and back: the tokenizer, prompt texts, chat templates, `</think>`, what may be mixed.

Owns everything that needs a tokenizer. Must not know models: ids are Python integers and NumPy arrays.
"""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from ngrpo_jax.choices import PROMPTS
from ngrpo_jax.errors import UserError, explained, require

from .datasets import Problem

MATH_SENTENCE = "Let's think step by step and output the final answer within \\boxed{}."
CHOICE_SENTENCE = (
    "Let's think step by step and output the final answer in the last line as:\nAnswer: <A/B/C/D>"
)
_ENDINGS = {"math": f" {MATH_SENTENCE}", "choice": f"\n\n{CHOICE_SENTENCE}", "plain": ""}
PLAIN = "plain"

Ids = Sequence[int] | np.ndarray
Flags = Sequence[bool] | np.ndarray
Tokenizer = Any  # transformers.PreTrainedTokenizerFast, imported late because that takes seconds


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of `directory/tokenizer.json`, from local files alone.

    Always a `PreTrainedTokenizerFast`: `AutoTokenizer` chooses a class by config.json's model type, and that
    class replaces the file's pre-tokenizer by its own. Raises UserError where there is no tokenizer.json, or
    where the files cannot be read.
    """
    folder = pathlib.Path(directory)
    fault = f"no tokenizer in {folder}: tokenizer.json is missing; copy the model's tokenizer files there"
    require((folder / "tokenizer.json").is_file(), fault)
    # transformers warns at import that PyTorch is missing, which this project does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    # The Rust tokenizer raises bare Exceptions.
    with explained(Exception, f"the tokenizer files in {folder} cannot be read", "copy them again"):
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        # PreTrainedTokenizerFast does not read this setting from the file.
        bos: dict[str, Any] = {"add_bos_token": True} if config.get("add_bos_token") else {}
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **bos)


def user_text(problem: str, kind: str = "math") -> str:
    """The user turn for a problem, in the paper's words; kind "plain" is the problem's text alone."""
    require(kind in _ENDINGS, f"unknown kind of problem {kind!r}; choose one of {', '.join(PROMPTS)}")
    return problem + _ENDINGS[kind]


def encode_prompt(
    tokenizer: Tokenizer,
    text: str,
    chat_template: str | None = None,
    system_prompt: str | None = None,
    template_options: Sequence[str] = (),
) -> list[int]:
    """Token ids of a prompt: perhaps a system turn, one user turn, and the beginning of the assistant turn.

    Args:
      text: the user turn, see `user_text`.
      chat_template: None = the tokenizer's own; "plain" = the text alone, after BOS if the tokenizer adds one
        to texts; otherwise the path of a Jinja file.
      system_prompt: the system turn; None for none.
      template_options: "NAME=VALUE" each, variables of the template.
    Raises UserError for a tokenizer without a template, for a template that does not render, and for a Jinja
    file that does not exist.
    """
    return _encode(tokenizer, [text], chat_template, system_prompt, template_options)[0]


def encode_problems(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    kind: str,
    chat_template: str | None,
    limit: int,
    system_prompt: str | None = None,
    template_options: Sequence[str] = (),
) -> tuple[list[Problem], list[list[int]], int]:
    """Encode every problem and drop those of more than `limit` tokens.

    Returns (problems kept, their prompts' ids, number dropped). Raises UserError where none is left.
    """
    texts = [user_text(p.problem, kind) for p in problems]
    prompts = _encode(tokenizer, texts, chat_template, system_prompt, template_options)
    kept = [(problem, ids) for problem, ids in zip(problems, prompts, strict=True) if len(ids) <= limit]
    require(
        bool(kept),
        f"all {len(prompts)} prompts are longer than data.max_prompt_tokens = {limit} "
        f"(the shortest has {min(map(len, prompts), default=0)} tokens); raise data.max_prompt_tokens",
    )
    return [problem for problem, _ in kept], [ids for _, ids in kept], len(prompts) - len(kept)


def _encode(
    tokenizer: Tokenizer,
    texts: list[str],
    chat_template: str | None,
    system_prompt: str | None,
    template_options: Sequence[str],
) -> list[list[int]]:
    if not texts:
        return []
    if chat_template == PLAIN:
        require(
            system_prompt is None and not template_options,
            "data.chat_template is 'plain', which has no turns: leave data.system_prompt and "
            "data.template_options out, or name a template.",
        )
        bos = tokenizer.bos_token if tokenizer.encode("a")[0] == tokenizer.bos_token_id else ""
        rendered = [bos + text for text in texts]
    else:
        rendered = _render(tokenizer, texts, chat_template, system_prompt, template_options)
    # The rendered text has BOS already: no further special tokens.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _render(
    tokenizer: Tokenizer,
    texts: list[str],
    chat_template: str | None,
    system_prompt: str | None,
    template_options: Sequence[str],
) -> list[str]:
    template = None
    if chat_template is not None:
        fault = f"data.chat_template = {chat_template!r} is neither 'plain' nor a readable Jinja file"
        with explained((OSError, UnicodeError), fault, "name another"):
            template = pathlib.Path(chat_template).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "set data.chat_template to a Jinja file or to 'plain'"
        )
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    turns = [[*system, {"role": "user", "content": text}] for text in texts]
    options = dict(_option(text) for text in template_options)
    fault = "the chat template does not render one user turn"
    # A template may put a problem into other words, but two problems may not become one prompt.
    probes = [[*system, {"role": "user", "content": text}] for text in ("1+2=", "3+4=")]
    with explained((jinja2.TemplateError, TypeError), fault, "set data.chat_template to another"):
        *rendered, one, other = tokenizer.apply_chat_template(
            [*turns, *probes], chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
    require(
        one != other,
        f"the chat template leaves out the problem's text ({one[-60:]!r}): it may want content in parts; set "
        "data.chat_template to one that takes it as text",
    )
    return rendered


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE -> (NAME, value): true, false, none, a number, or the text itself."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# Characters that may precede and follow the text in a response; they can share a token with its ends.
_BEFORE = ("", " ", "\n", "a", "1", *".)]}>$*!?:\"'`")
_AFTER = ("", " ", "\n", "\n\n", "a", "1", *"\\$*<([.,:\"'")


def until_ids(tokenizer: Tokenizer, text: str = "</think>") -> tuple[int | tuple[int, ...], ...]:
    """Every run of tokens that completes `text`: an id where one token covers it, else a tuple of ids.

    A tokenizer without a token for `text` cuts it differently beside different characters ("</", "think",
    ">" but "</", "think", ">\\n"). The runs are found by encoding `text` between the usual neighbouring
    characters and taking the shortest run that covers it. Shorter runs first. Raises UserError where the
    tokenizer cannot write `text`.
    """
    contexts = list(itertools.product(_BEFORE, _AFTER))
    encodings = tokenizer.backend_tokenizer.encode_batch(
        [before + text + after for before, after in contexts], add_special_tokens=False
    )
    runs = set()
    for (before, _), encoding in zip(contexts, encodings, strict=True):
        start, stop = len(before), len(before) + len(text)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        run = tuple(token for token, (low, high) in spans if low < stop and high > start)
        if text in tokenizer.decode(list(run), skip_special_tokens=False):
            runs.add(run)
    require(bool(runs), f"the tokenizer of {tokenizer.name_or_path} cannot write {text!r}")
    return tuple(run[0] if len(run) == 1 else run for run in sorted(runs, key=lambda run: (len(run), run)))


def usable_rows(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """bool [V]: the rows of the embedding that may be neighbours of others.

    False for rows that no token uses, for special tokens, and for every token added to the learned vocabulary
    (R1-distill's `<think>` and turn markers are added tokens that are not flagged as special). Raises
    UserError where the tokenizer has ids beyond the model's `vocab_size` rows.
    """
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    require(
        largest < vocab_size,
        f"the tokenizer of {tokenizer.name_or_path} has ids up to {largest}, but the model only "
        f"{vocab_size} rows; use the tokenizer that the model was trained with",
    )
    valid_V = np.zeros(vocab_size, bool)
    valid_V[list(vocabulary.values())] = True
    valid_V[[*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]] = False
    return valid_V


def matching_rows(tokenizer: Tokenizer, pattern: str, rows: int) -> np.ndarray:
    r"""bool [V], V = `rows`: the tokens in whose text the regular expression `pattern` is found anywhere.

    A token's text is what it adds to a preceding text, leading space included: `^ ?\d+$` matches numbers.
    Rows that no token uses never match. Raises UserError for a pattern that is malformed or matches no token.
    """
    with explained(re.error, f"mixing.keep_out {pattern!r} is no regular expression", "correct it"):
        found = re.compile(pattern)
    matching_V = np.zeros(rows, bool)
    for token, text in _token_texts(tokenizer).items():
        matching_V[token] = found.search(text) is not None
    fault = f"mixing.keep_out {pattern!r} matches no token of {tokenizer.name_or_path}"
    require(bool(matching_V.any()), f"{fault}; correct it, or set it to None")
    return matching_V


def spelling_groups(tokenizer: Tokenizer, rows: int) -> np.ndarray:
    """int32 [V], V = `rows`: equal for tokens whose texts differ in case or one leading space alone.

    A token that is a part of a character, and a row that no token uses, is a group of its own.
    """
    groups_V = np.arange(rows, dtype=np.int32)
    first: dict[str, int] = {}
    for token, text in sorted(_token_texts(tokenizer).items()):
        if "\N{REPLACEMENT CHARACTER}" not in text:
            groups_V[token] = first.setdefault(text.removeprefix(" ").lower(), token)
    return groups_V


def _token_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """The text that each token adds to a preceding one; alone, some tokenizers drop its leading space."""
    ids = sorted(tokenizer.get_vocab().values())
    before = tokenizer.encode("a", add_special_tokens=False)
    decode_batch = tokenizer.backend_tokenizer.decode_batch
    (prefix,) = decode_batch([before], skip_special_tokens=False)
    texts = decode_batch([[*before, token] for token in ids], skip_special_tokens=False)
    return {token: text[len(prefix) :] for token, text in zip(ids, texts, strict=True)}


def stop_ids(tokenizer: Tokenizer, eos_token_ids: Sequence[int], more: Sequence[str] = ()) -> tuple[int, ...]:
    """The ids that end a response: the model's `eos_token_ids`, the tokenizer's EOS and `more`, ascending.

    Args:
      more: tokens as text, or ids as decimal text.
    Raises UserError for a text that is no single token, an id without a token, and where there is no id.
    """
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    found = tuple(sorted({*eos_token_ids, *own, *(_stop_id(tokenizer, text) for text in more)}))
    require(
        bool(found),
        f"no file of {tokenizer.name_or_path} says which token ends a response, so that none would end; name "
        "one with data.stop",
    )
    return found


def _stop_id(tokenizer: Tokenizer, text: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if text.isdecimal() and text not in vocabulary:
        require(int(text) < max(vocabulary.values()) + 1, f"data.stop {text} is the id of no token")
        return int(text)
    ids = [vocabulary[text]] if text in vocabulary else tokenizer.encode(text, add_special_tokens=False)
    require(len(ids) == 1, f"data.stop {text!r} is no single token of {tokenizer.name_or_path}; name one")
    return ids[0]


def turn_end(tokenizer: Tokenizer, chat_template: str | None) -> int | None:
    """The special token that a chat template writes after a response; None where it writes none."""
    if chat_template == PLAIN:
        return None
    text, mark = "x", "ngrpo"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": mark}]
    template = None if chat_template is None else pathlib.Path(chat_template).read_text(encoding="utf-8")
    try:
        rendered = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError):  # only the prompt's turn has to be rendered
        return None
    ids = tokenizer.encode(rendered.rpartition(mark)[2], add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in ids if token in special), None)


def response_text(tokenizer: Tokenizer, tokens: Ids) -> str:
    """The text to grade: without special tokens, but with `<think>` and `</think>` whatever their flags."""
    shown = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    hidden = set(tokenizer.all_special_ids).difference(shown)
    kept = [int(token) for token in tokens if int(token) not in hidden]
    return tokenizer.decode(kept, skip_special_tokens=False)


def mixed_places(tokenizer: Tokenizer, tokens: Ids, mixed: Flags) -> tuple[str, list[tuple[int, int, int]]]:
    """The text of `tokens`, special ones included, and (start, end, position) of its mixed tokens.

    Start and end are characters of the text, position is the token's. A span never splits a character:
    tokens that share one have one span, with the position of the first mixed one of them.
    """
    text, places, position = "", [], 0
    for piece, count in _display_pieces(tokenizer, [int(t) for t in tokens]):
        of_piece = [at for at in range(position, position + count) if mixed[at]]
        if of_piece:
            places.append((len(text), len(text) + len(piece), of_piece[0]))
        text, position = text + piece, position + count
    return text, places


def marked_text(tokenizer: Tokenizer, tokens: Ids, mixed: Flags) -> str:
    """The text of `tokens` with each span of mixed tokens between ⟦ and ⟧."""
    text, places = mixed_places(tokenizer, tokens, mixed)
    spans: list[tuple[int, int]] = []
    for start, end, _ in places:
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    for start, end in reversed(spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def _display_pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[tuple[str, int]]:
    """(text, 1) of each token, (text, count) of several that are whole characters only together.

    The text of a piece is what it adds to the piece before it; alone, some tokenizers would drop its leading
    space.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces: list[tuple[str, int]] = []
    context: list[int] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        before, through = decode(context), decode(context + tokens[start:end])
        if end < len(tokens) and through.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # the rest of this character is in the next token
        pieces.append((through[len(before) :], end - start))
        context, start = tokens[start:end], end
    return pieces
