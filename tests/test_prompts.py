"""Prompts, `</think>` and display, on tokenizers of different kinds."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from ngrpo_jax.errors import UserError
from ngrpo_jax.tasks import arithmetic, prompts
from ngrpo_jax.tasks.datasets import Problem

R1_DISTILL = pathlib.Path(__file__).parent.parent.parent / "shared" / "tokenizers" / "r1_distill_qwen"
needs_r1_distill = pytest.mark.skipif(not R1_DISTILL.is_dir(), reason="the R1-distill tokenizer is not here")


@pytest.fixture(scope="module")
def tiny():
    return prompts.load_tokenizer(arithmetic.TOKENIZER)


def byte_level_directory(directory):
    """A byte-level BPE without a token for `</think>`, without a template, with an id left unused."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("<", "/"),
        ("Ġ", "</"),
        ("t", "h"),
        ("th", "i"),
        ("n", "k"),
        ("thi", "nk"),
        (">", "Ċ"),
        ("Ġ", "x"),
    ]
    tokens = [*alphabet, *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)} | {"<eos>": len(tokens) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\p{N}|\s+"
    cut = pre_tokenizers.Split(Regex(split), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return prompts.load_tokenizer(byte_level_directory(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def r1_distill():
    return prompts.load_tokenizer(R1_DISTILL)


def test_user_text_is_the_papers():
    assert prompts.user_text("1+1?", "math") == (
        "1+1? Let's think step by step and output the final answer within \\boxed{}."
    )
    assert prompts.user_text("Which?\n(A) x", "choice") == (
        "Which?\n(A) x\n\nLet's think step by step and output the final answer in the last line as:\n"
        "Answer: <A/B/C/D>"
    )
    assert prompts.user_text("1+1?", "plain") == "1+1?"
    with pytest.raises(
        ValueError, match="unknown kind of problem 'maths'; choose one of math, choice, plain"
    ):
        prompts.user_text("1+1?", "maths")


@needs_r1_distill
def test_r1_distill_prompt_ids(r1_distill):
    expected = [151646, 151644, 16, 10, 16, 30, 151645, 151648, 198]
    assert prompts.encode_prompt(r1_distill, "1+1?") == expected


@needs_r1_distill
def test_r1_distill_closing_tag_is_one_id_found_in_a_response(r1_distill):
    (until,) = prompts.until_ids(r1_distill)
    for response in ("It is 2.</think>\\boxed{2}", "It is\n</think>\n\n2", "</think>"):
        assert until in r1_distill.encode(response, add_special_tokens=False)


@needs_r1_distill
def test_r1_distill_markers_are_no_usable_rows(r1_distill):
    valid_V = prompts.usable_rows(r1_distill, 151936)
    assert valid_V.shape == (151936,) and valid_V.dtype == bool
    markers = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>"]
    assert not valid_V[r1_distill.convert_tokens_to_ids(markers)].any()
    assert not valid_V[151665:].any()  # rows that no token uses
    assert valid_V[:151643].all()


def test_a_tokenizer_beside_a_qwen2_model_stays_what_its_file_says(tmp_path):
    byte_level_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = prompts.load_tokenizer(tmp_path)
    # Qwen2's own pre-tokenizer would keep the last space with its letter, and they would merge.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12 x")) == ["1", "2", "Ġ", "x"]


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer in {tmp_path}: tokenizer.json is missing"):
        prompts.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"model": 5}'])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer files in {tmp_path} cannot be read"):
        prompts.load_tokenizer(tmp_path)


def test_without_a_template_the_setting_is_named(byte_level):
    with pytest.raises(ValueError, match=r"has no chat template; set data\.chat_template"):
        prompts.encode_prompt(byte_level, "1+1?")


def test_plain_prompts_are_the_text_and_bos_where_the_tokenizer_puts_one(byte_level, tiny, tmp_path):
    assert prompts.encode_prompt(byte_level, "1+1?", "plain") == byte_level.encode("1+1?")
    assert tiny.decode(prompts.encode_prompt(tiny, "1+1?", "plain")) == "1+1?"
    config = json.loads((arithmetic.TOKENIZER / "tokenizer_config.json").read_text()) | {
        "add_bos_token": True
    }
    shutil.copy(arithmetic.TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with_bos = prompts.load_tokenizer(tmp_path)
    assert with_bos.decode(prompts.encode_prompt(with_bos, "1+1?", "plain")) == "<bos>1+1?"


def test_a_template_file_takes_the_place_of_the_tokenizers_own(tiny, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ bos_token }}Q: {{ messages[0]['content'] }} A:")
    assert tiny.decode(prompts.encode_prompt(tiny, "1+1?", str(file))) == "<bos>Q: 1+1? A:"


def test_a_system_turn_and_options_reach_the_template(tiny, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(
        "{% for turn in messages %}{{ turn['role'][0] }}:{{ turn['content'] }} {% endfor %}"
        "{{ 'on' if think else 'off' }}{{ n + 1 }}{{ word }}"
    )
    options = ("think=false", "n=2", "word=1")
    ids = prompts.encode_prompt(tiny, "1+1?", str(file), "2+2", options)
    assert tiny.decode(ids) == "s:2+2 u:1+1? off31"
    problems = [Problem("0", "1+1?", "2")]
    _, encoded, _ = prompts.encode_problems(tiny, problems, "plain", str(file), 99, "2+2", options)
    assert encoded == [ids]
    with pytest.raises(UserError, match="'plain', which has no turns"):
        prompts.encode_prompt(tiny, "1+1?", "plain", "2+2")
    with pytest.raises(UserError, match="does not render"):
        prompts.encode_prompt(tiny, "1+1?", str(file), None, ("tokenize=true",))


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ raise_exception('no') }}", "{{ messages[5]['content'] }}"]
)
def test_a_template_that_does_not_render_is_a_value_error(tiny, tmp_path, template):
    file = tmp_path / "template.jinja"
    file.write_text(template)
    with pytest.raises(ValueError, match="the chat template does not render one user turn"):
        prompts.encode_prompt(tiny, "1+1?", str(file))


def test_a_missing_template_file_is_named(tiny):
    with pytest.raises(UserError, match=r"data\.chat_template = 'nowhere.jinja'"):
        prompts.encode_prompt(tiny, "1+1?", "nowhere.jinja")


def test_encode_problems_drops_the_long_and_counts_them(tiny):
    texts = ["1+1=", "10+10=", "100+100="]
    problems = [Problem(str(i), text, "2") for i, text in enumerate(texts)]
    limit = len(prompts.encode_prompt(tiny, "10+10="))
    kept, ids, dropped = prompts.encode_problems(tiny, problems, "plain", None, limit)
    assert kept == problems[:2] and dropped == 1
    assert ids == [prompts.encode_prompt(tiny, text) for text in texts[:2]]


def test_encode_problems_with_none_short_enough_names_the_limit_and_the_shortest(tiny):
    shortest = len(prompts.encode_prompt(tiny, "1+1="))
    problems = [Problem("a", "1+1=", "2"), Problem("b", "10+1=", "11")]
    with pytest.raises(
        ValueError, match=rf"data.max_prompt_tokens = 3 \(the shortest has {shortest} tokens\)"
    ):
        prompts.encode_problems(tiny, problems, "plain", None, 3)


def completes(ids, until):
    runs = [run if isinstance(run, tuple) else (run,) for run in until]
    return any(tuple(ids[i : i + len(run)]) == run for run in runs for i in range(len(ids)))


def test_until_ids_is_a_single_id_where_the_tokenizer_has_one(tiny):
    assert prompts.until_ids(tiny) == (tiny.convert_tokens_to_ids("</think>"),)


def test_until_ids_finds_every_cut_of_a_text_without_a_token(byte_level):
    until = prompts.until_ids(byte_level)
    assert len(until) == len(set(until)) > 1
    for run in until:
        assert isinstance(run, tuple) and "</think>" in byte_level.decode(run)
        # The shortest run: without either end it is no longer there.
        assert "</think>" not in byte_level.decode(run[1:])
        assert "</think>" not in byte_level.decode(run[:-1])
    for before in ("", "so 2.", "so\n", "so ", "x"):
        for after in ("", "\nso", " so", "2", "\\boxed{2}"):
            assert completes(byte_level.encode(f"{before}</think>{after}"), until), (before, after)
    assert not completes(byte_level.encode("<think> </thin> think>"), until)


def test_until_ids_of_text_that_cannot_be_written_is_an_error(tiny):
    with pytest.raises(ValueError, match="cannot write '思考'"):
        prompts.until_ids(tiny, "思考")


def test_usable_rows_leave_out_special_added_and_unused(tiny, byte_level):
    valid_V = prompts.usable_rows(tiny, 128)
    assert not valid_V[: tiny.convert_tokens_to_ids("0")].any()
    assert valid_V[tiny.convert_tokens_to_ids("0") : len(tiny)].all() and not valid_V[len(tiny) :].any()
    valid_V = prompts.usable_rows(byte_level, 300)
    used = sorted(set(byte_level.get_vocab().values()) - {byte_level.eos_token_id})
    assert np.flatnonzero(valid_V).tolist() == used


def test_usable_rows_of_a_model_too_small_for_its_tokenizer(tiny):
    with pytest.raises(ValueError, match=r"ids up to 108, but the model only 100 rows"):
        prompts.usable_rows(tiny, 100)


def test_stop_ids_may_be_added_as_text_or_number_and_there_has_to_be_one():
    tiny = prompts.load_tokenizer(arithmetic.TOKENIZER)
    (nine,) = tiny.encode("9", add_special_tokens=False)
    # "9" is a token, and so a text rather than an id.
    assert prompts.stop_ids(tiny, (), ("9", "22")) == tuple(sorted({tiny.eos_token_id, nine, 22}))
    for text, words in {"999999": "the id of no token", "9+9": "no single token"}.items():
        with pytest.raises(UserError, match=words):
            prompts.stop_ids(tiny, (), (text,))
    tiny.eos_token = None
    with pytest.raises(UserError, match=r"so that none would end; name one with data\.stop"):
        prompts.stop_ids(tiny, ())
    assert prompts.stop_ids(tiny, (), ("22",)) == (22,)


def test_the_end_of_a_turn_is_read_from_the_template(tiny, tmp_path):
    assert prompts.turn_end(tiny, prompts.PLAIN) is None
    path = tmp_path / "template.jinja"
    eos = tiny.eos_token
    path.write_text("{% for m in messages %}{{ m.content }}" + eos + "{% endfor %}")
    assert prompts.turn_end(tiny, str(path)) == tiny.eos_token_id
    path.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert prompts.turn_end(tiny, str(path)) is None


def test_a_template_that_leaves_out_the_problem_is_refused(tiny, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}=\n{% endfor %}")
    with pytest.raises(UserError, match="the chat template leaves out the problem's text"):
        prompts.encode_prompt(tiny, "1+1", str(path))
    odd = prompts.load_tokenizer(arithmetic.TOKENIZER)
    odd.chat_template = -1
    with pytest.raises(UserError, match="the chat template does not render one user turn"):
        prompts.encode_prompt(odd, "1+1")
    path.write_text("{% for m in messages %}{{ m.content.rstrip('=') }}-{% endfor %}")  # in other words
    assert prompts.encode_prompt(tiny, "1+1=", str(path)) == tiny.encode("1+1-", add_special_tokens=False)
    path.write_text("{% for m in messages %}{{ m.content | trim }}={% endfor %}")
    assert prompts.encode_prompt(tiny, " 1+1 ", str(path)) == tiny.encode("1+1=", add_special_tokens=False)


def test_stop_ids_are_a_union(tiny, byte_level):
    assert prompts.stop_ids(tiny, (7, 2, 7)) == (2, 7)
    assert prompts.stop_ids(byte_level, ()) == (byte_level.eos_token_id,)


def test_response_text_keeps_the_thinking_tags_and_drops_special_tokens(tmp_path, tiny):
    shutil.copytree(arithmetic.TOKENIZER, tmp_path, dirs_exist_ok=True)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        token["special"] = True  # as some tokenizers have it
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    for tokenizer in (tiny, prompts.load_tokenizer(tmp_path)):
        ids = tokenizer.encode("1+1=2\n</think>2<eos>", add_special_tokens=False)
        assert prompts.response_text(tokenizer, np.array(ids)) == "1+1=2\n</think>2"


def test_marked_text_marks_runs_of_mixed_tokens(tiny):
    ids = tiny.encode("1+2=3</think>", add_special_tokens=False)
    mixed = [False, True, True, False, True, True]
    assert prompts.marked_text(tiny, ids, mixed) == "1⟦+2⟧=⟦3</think>⟧"
    assert prompts.marked_text(tiny, [], []) == ""


def test_marked_text_never_splits_a_character(byte_level):
    text = "a 日本 b"
    ids = byte_level.encode(text)
    assert len(ids) > len(text)
    mixed = [byte_level.decode([i]) == "\N{REPLACEMENT CHARACTER}" and n == 3 for n, i in enumerate(ids)]
    assert sum(mixed) == 1
    assert prompts.marked_text(byte_level, ids, mixed) == "a ⟦日⟧本 b"
    for pattern in np.random.default_rng(0).random((50, len(ids))) < 0.5:
        assert prompts.marked_text(byte_level, ids, pattern).replace("⟦", "").replace("⟧", "") == text


def test_matching_rows_match_the_text_with_its_leading_space(byte_level):
    rows = len(byte_level) + 5
    spaced = prompts.matching_rows(byte_level, r"^ x$", rows)
    assert spaced.shape == (rows,) and spaced.dtype == bool
    assert np.flatnonzero(spaced).tolist() == [byte_level.convert_tokens_to_ids("Ġx")]
    digits = np.flatnonzero(prompts.matching_rows(byte_level, r"\d", rows))
    assert digits.tolist() == sorted(byte_level.convert_tokens_to_ids(list("0123456789")))
    assert not prompts.matching_rows(byte_level, ".", rows)[-3:].any(), "rows that no token uses"


@pytest.mark.parametrize(
    ("pattern", "sentence"), [("[", "is no regular expression"), ("zzzz", "matches no token")]
)
def test_a_wrong_pattern_is_named(byte_level, pattern, sentence):
    with pytest.raises(ValueError, match=f"mixing.keep_out .*{sentence}"):
        prompts.matching_rows(byte_level, pattern, len(byte_level) + 1)


def test_spelling_groups_join_case_and_a_leading_space_alone(byte_level):
    rows = len(byte_level) + 5
    groups = prompts.spelling_groups(byte_level, rows)
    ids = byte_level.convert_tokens_to_ids
    assert groups[ids("x")] == groups[ids("X")] == groups[ids("Ġx")]
    assert groups[ids("x")] != groups[ids("y")] and groups[ids("</")] == groups[ids("Ġ</")]
    assert groups[ids(">")] != groups[ids(">Ċ")], "a line break is no leading space"
    bytes_alone = [i for i in range(rows - 4) if "\ufffd" in byte_level.decode([i])]
    assert len(bytes_alone) > 50 and len({int(groups[i]) for i in bytes_alone}) == len(bytes_alone)
    assert len(set(groups[-3:].tolist())) == 3


@needs_r1_distill
def test_spelling_groups_of_a_real_vocabulary(r1_distill):
    groups = prompts.spelling_groups(r1_distill, 151936)
    same = [
        r1_distill.encode(text, add_special_tokens=False) for text in ("the", " the", "The", " The", " THE")
    ]
    assert all(len(ids) == 1 for ids in same) and len({int(groups[ids[0]]) for ids in same}) == 1
    digits = np.flatnonzero(prompts.matching_rows(r1_distill, r"^ ?\d+$", 151936))
    assert len(digits) >= 10
