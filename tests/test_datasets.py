"""Problems from every source, mistakes named by their place, and the order of problems in training."""

import dataclasses
import json
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from ngrpo_jax.errors import UserError
from ngrpo_jax.tasks import rows
from ngrpo_jax.tasks.datasets import Problem, fingerprint, load_problems, problem_order

ROWS = [{"problem": "1+1?", "answer": "2"}, {"id": "b", "problem": "Is 3 odd?\u2028Say.", "answer": "yes"}]
PROBLEMS = [Problem("row-1", "1+1?", "2"), Problem("b", "Is 3 odd?\u2028Say.", "yes")]


def load(source, split="train", seed=0, size=None):
    return load_problems(source, split=split, seed=seed, size=size)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


# Sources


def test_jsonl_rows_end_at_newlines_only(tmp_path):
    assert load(write_jsonl(tmp_path / "a.jsonl", ROWS)) == PROBLEMS


def test_jsonl_tolerates_blank_lines_carriage_returns_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"problem": "p", "answer": 5}\r\n\r\n{"problem": "q", "answer": 1.5}'
    )
    assert load(f"jsonl:{tmp_path / 'a.jsonl'}") == [Problem("row-1", "p", "5"), Problem("row-3", "q", "1.5")]


def test_fields_may_have_other_names(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "1+1?", "final": "2", "key": 7, "answer": "no"}])
    assert load(f"{source}?problem=question&answer=final&id=key") == [Problem("7", "1+1?", "2")]


def test_parquet(tmp_path):
    table = pyarrow.table({name: [row.get(name) for row in ROWS] for name in ("id", "problem", "answer")})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load(f"parquet:{tmp_path / 'a.parquet'}") == PROBLEMS


def test_json_and_csv(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    assert load(f"json:{tmp_path / 'a.json'}") == PROBLEMS
    text = '\ufeffid,question,answer\r\n,1+1?,2\r\n\r\nb,"Is 3\n""odd""?",yes\r\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    assert load(f"csv:{tmp_path / 'a.csv'}?problem=question") == [
        Problem("row-1", "1+1?", "2"),
        Problem("b", 'Is 3\n"odd"?', "yes"),
    ]


def test_a_json_file_of_json_lines_is_read_as_such(tmp_path):
    write_jsonl(tmp_path / "a.json", ROWS)
    assert load(f"json:{tmp_path / 'a.json'}") == PROBLEMS


def test_arithmetic_takes_split_seed_and_size():
    problems = load("arithmetic:terms=2,digits=1", size=5)
    assert len(problems) == 5 and problems != load("arithmetic:terms=2,digits=1", seed=1, size=5)
    assert not set(load("arithmetic", size=300)) & set(load("arithmetic", split="test", size=300))


def own_source(split, seed):
    for i in range(3):
        yield {"problem": f"{split} {seed} {i}", "answer": i}


def test_a_users_function():
    problems = load(f"{__name__}:own_source", split="test", seed=4)
    assert problems[2] == Problem("row-3", "test 4 2", "2") and len(problems) == 3


def test_size_takes_the_first(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert load(source, size=1) == PROBLEMS[:1]
    assert load(source, size=9) == PROBLEMS
    with pytest.raises(ValueError, match="the number of problems is 0"):
        load(source, size=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS data set of five and two problems, prepared as array_record in a folder of its own."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class SumsForTests(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"problem": text, "answer": text})
            )

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"problem": f"{i}+½?", "answer": str(i + 1)}

    folder = tmp_path_factory.mktemp("tfds")
    SumsForTests(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds_gives_text_of_each_split(prepared):
    for split, count in (("train", 5), ("test", 2)):
        problems = load(f"tfds:sums_for_tests?data_dir={prepared}", split=split)
        assert {(p.problem, p.answer) for p in problems} == {(f"{i}+½?", str(i + 1)) for i in range(count)}


def test_tfds_needs_no_tensorflow_and_no_builder_code(prepared):
    code = (
        "import sys; from ngrpo_jax.tasks.datasets import load_problems; "
        f"print(len(load_problems('tfds:sums_for_tests:1.0.0?data_dir={prepared}', split='train', seed=0)), "
        "'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "5 False\n", done.stderr


def test_tfds_mistakes_say_what_to_do(prepared, tmp_path):
    with pytest.raises(ValueError, match=f"no TFDS data set 'no_such_set': neither prepared in {tmp_path}"):
        load(f"tfds:no_such_set?data_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"'mnist' is not prepared in .*; prepare it once with python -c"):
        load(f"tfds:mnist?data_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"cannot give the split 'dev' \(.*\['train', 'test'\]"):
        load(f"tfds:sums_for_tests?data_dir={prepared}", split="dev")


# Mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"problem": "p"}',
            ", row 2: no field 'answer', which every row needs (fields here: problem)",
        ),
        ('{"answer": "2"}', ", row 2: no field 'problem'"),
        ('{"problem": null, "answer": "2"}', ", row 2: field 'problem' is empty"),
        ('{"problem": " ", "answer": "2"}', ", row 2: field 'problem' is empty"),
        ('{"problem": "p", "answer": NaN}', ", row 2: field 'answer' is empty"),
        ('{"problem": 5, "answer": "2"}', ", row 2: field 'problem' is int, not text"),
        ('{"problem": "p", "answer": ["2"]}', ", row 2: field 'answer' is list, not text"),
        ('{"problem": "p", "answer": true}', ", row 2: field 'answer' is bool, not text"),
        ('{"problem": "\\ud800", "answer": "2"}', ", row 2: field 'problem' holds half a character"),
        (
            '{"problem": "p", "answer": "2", "id": "row-1"}',
            ", row 2: row 1 has the id 'row-1' too",
        ),
        ('["p", "2"]', ", row 2: not an object with the fields problem and answer"),
        ('{"problem": "p", ', " line 2 is not JSON ("),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        load(f"jsonl:{path}")


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"problem": "é", "answer": "2"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{path} line 1 is not UTF-8 text")):
        load(f"jsonl:{path}")


def test_a_parquet_file_without_the_field_or_broken_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["p"]}), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 1: no field 'answer'")):
        load(f"parquet:{path}")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable parquet file")):
        load(f"parquet:{path}")


def test_an_empty_data_set_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl' \(split 'train'\) is empty"):
        load(f"jsonl:{tmp_path / 'a.jsonl'}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("jsonl:nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("gsm8k", "unknown data source 'gsm8k'; write arithmetic, jsonl:PATH"),
        ("jsonl:", "unknown data source 'jsonl:'"),
        ("https://example.org/a", "unknown data source"),
        (
            "jsonl:a.jsonl?question=q",
            "question=q is not understood; after the question mark write",
        ),
        ("no_such_module:f", "the data source 'no_such_module:f' cannot be imported"),
    ],
)
def test_a_source_that_is_none_is_named(source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(source)


# The order of problems in training


def order(steps, **changes):
    """The indices that steps 1.. take, one after another."""
    arguments = {"count": 10, "seed": 3, "batch": 4} | changes
    count = arguments.pop("count")
    return [i for step in range(1, steps + 1) for i in problem_order(count, step=step, **arguments).tolist()]


def test_each_epoch_holds_every_problem_once_in_an_order_of_its_own():
    taken = order(10)  # batches of 4 run on across the ends of epochs of 10
    epochs = [taken[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_hold_several_epochs():
    assert order(1, count=3, batch=10) == order(10, count=3, batch=1)


def test_seed_and_step_alone_decide_the_order():
    assert problem_order(10, seed=3, step=7, batch=4).tolist() == order(7)[-4:]
    assert order(6) == order(4, batch=6) != order(4, batch=6, seed=4)


def test_the_order_of_a_seed_is_pinned():
    """A resumed run goes on in this order: no release of NumPy and no change of ours may alter it."""
    assert order(5) == [6, 1, 8, 5, 2, 7, 9, 4, 3, 0, 9, 7, 8, 3, 5, 6, 4, 0, 2, 1]


def test_the_fingerprint_differs_with_every_change_of_problems_order_or_seed():
    changed = [
        PROBLEMS[::-1],
        PROBLEMS[:1],
        [PROBLEMS[0], dataclasses.replace(PROBLEMS[1], answer="no")],
        [PROBLEMS[0], dataclasses.replace(PROBLEMS[1], problem="Is 3 odd? Say.")],
        [PROBLEMS[0], dataclasses.replace(PROBLEMS[1], id="c")],
    ]
    found = {fingerprint(PROBLEMS, 0), fingerprint(PROBLEMS, 1), *(fingerprint(one, 0) for one in changed)}
    assert len(found) == 7 and fingerprint(list(PROBLEMS), 0) in found


def test_verls_parquet_files_are_read(tmp_path):
    """Nested fields and chats: data_source, prompt as turns, reward_model.ground_truth."""
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4"}}
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    source = f"parquet:{path}?problem=prompt&answer=reward_model.ground_truth"
    (problem,) = load_problems(source, split="train", seed=0)
    assert (problem.problem, problem.answer) == ("2+2?", "4")
    with pytest.raises(UserError, match=r"row 1: no field 'reward_model\.truth'"):
        load_problems(source.replace("ground_truth", "truth"), split="train", seed=0)
    chat = [{"role": "system", "content": "Be brief."}, *row["prompt"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"prompt": chat}]), path)
    with pytest.raises(UserError, match=r"row 1: field 'prompt' is a chat of the turns system, user"):
        load_problems(source, split="train", seed=0)


def test_a_field_whose_own_name_has_a_dot_is_that_field():
    row = {"a.b": "own", "a": {"b": "nested"}}
    assert rows.opened("place", row, ["a.b"])["a.b"] == "own"
    assert rows.opened("place", {"a": 1}, ["a.b"]) == {"a": 1}


@pytest.mark.parametrize(
    ("query", "row", "remedy"),
    [
        ("", '{"question": "1+1", "answer": "2"}', "?problem=question"),
        ("?answer=gold", '{"question": "1+1", "gold": "2"}', "?answer=gold&problem=question"),
        ("", '{"question": "1+1", "topic": "sums", "answer": "2"}', "?problem=FIELD"),
        ("?problem=text", '{"question": "1+1", "answer": "2"}', None),
    ],
)
def test_how_a_field_of_another_name_is_named(tmp_path, query, row, remedy):
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(UserError) as refusal:
        load_problems(f"jsonl:{path}{query}", split="train", seed=0)
    assert str(refusal.value).endswith(f"; name it by jsonl:{path}{remedy}" if remedy else ")")
