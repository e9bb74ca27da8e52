"""The arithmetic task: right answers, splits that never meet, and a tokenizer that loses nothing."""

import json
import re
import string

import pytest

from ngrpo_jax.tasks import arithmetic
from ngrpo_jax.tasks.prompts import encode_prompt, load_tokenizer

SPECS = ["", "terms=2,digits=1,ops=+", "terms=2-4,digits=2", "terms=3,digits=3,ops=+-*"]


def problems(spec, split="train", seed=0, size=None):
    return arithmetic.generate(arithmetic.parse_spec(spec), split=split, seed=seed, size=size)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(arithmetic.TOKENIZER)


@pytest.mark.parametrize("spec", SPECS)
def test_answers_are_what_python_computes(spec):
    for row in problems(spec, size=50):
        expression = re.sub(r"\b0+(?=\d)", "", row["problem"].removesuffix("="))
        assert int(row["answer"]) == eval(expression)


@pytest.mark.parametrize("spec", SPECS)
def test_splits_never_share_a_problem_whatever_their_seeds(spec):
    train = {row["problem"] for seed in range(3) for row in problems(spec, "train", seed)}
    test = {row["problem"] for seed in range(3) for row in problems(spec, "test", seed)}
    assert train and test and not train & test


@pytest.mark.parametrize("spec", SPECS)
def test_the_seed_alone_decides_and_a_smaller_size_is_a_prefix(spec):
    assert problems(spec, size=60) == problems(spec, size=60)
    assert problems(spec, size=60)[:20] == problems(spec, size=20)
    assert problems(spec, size=60) != problems(spec, seed=1, size=60)


@pytest.mark.parametrize("spec", SPECS)
def test_problems_and_ids_are_all_different(spec):
    rows = problems(spec)
    assert len({row["problem"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)


def test_the_family_is_as_parameterised():
    for row in problems("terms=2-3,digits=2,ops=-*", size=200):
        assert re.fullmatch(r"\d{1,2}([-*]\d{1,2}){1,2}=", row["problem"])
    assert arithmetic.parse_spec("terms=2-3,digits=1,ops=+-").size == 10**2 * 2 + 10**3 * 4


def test_a_small_family_is_found_whole():
    train, test = problems("terms=2,digits=1,ops=+"), problems("terms=2,digits=1,ops=+", "test")
    assert len(train) + len(test) == 100


def test_worked_solution_shows_the_running_total():
    assert arithmetic.worked_solution("37+48-15=") == "<think>\n37+48=85\n85-15=70\n</think>\\boxed{70}"
    assert arithmetic.worked_response("3-4*5=") == "4*5=20\n3-20=-17\n</think>\\boxed{-17}"


def test_worked_solution_refuses_other_text():
    with pytest.raises(ValueError, match="is not an arithmetic problem"):
        arithmetic.worked_solution("What is one and one?")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("terms=1", "terms must be"),
        ("terms=4-2", "terms must be"),
        ("digits=0", "digits must be"),
        ("ops=/", "ops must be"),
        ("ops=++", "ops must be"),
        ("digit=2", "'digit=2' is not understood"),
        ("terms", "'terms' is not understood"),
    ],
)
def test_a_bad_spec_is_named(spec, message):
    with pytest.raises(ValueError, match=f"arithmetic:{re.escape(spec)}'.*{message}"):
        arithmetic.parse_spec(spec)


def test_too_many_problems_and_unknown_splits_are_refused():
    with pytest.raises(ValueError, match=r"has only .* different test problems"):
        problems("terms=2,digits=1,ops=+", "test", size=99)
    with pytest.raises(ValueError, match="splits train and test, not 'validation'"):
        problems("", "validation")


def test_tokenizer_encodes_every_printable_character_exactly(tokenizer):
    text = string.printable + " two  spaces don't , collapse .\n\n" + arithmetic.worked_solution("37+48-15=")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_tokenizer_has_one_token_a_digit_and_one_a_marker(tokenizer):
    ids = tokenizer.encode("<think>\n37</think>\\boxed{70}", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids] == [
        "<think>", "\n", "3", "7", "</think>", "\\boxed{", "7", "0", "}",
    ]  # fmt: skip
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_the_prompt_opens_the_thinking_and_the_worked_response_goes_on_from_it(tokenizer):
    prompt = encode_prompt(tokenizer, "37+48-15=")
    assert prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt) == "<bos><user>37+48-15=<assistant><think>\n"
    response = tokenizer.encode(arithmetic.worked_response("37+48-15="), add_special_tokens=False)
    assert tokenizer.decode(prompt + response).endswith(
        "<assistant>" + arithmetic.worked_solution("37+48-15=")
    )


def test_tokenizer_files_are_of_the_class_that_reads_them_as_they_are():
    config = json.loads((arithmetic.TOKENIZER / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
