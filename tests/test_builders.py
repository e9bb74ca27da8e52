"""TFDS data sets: from every kind of file, from a stand-in of the hub, and what is refused."""

import collections
import csv
import filecmp
import functools
import hashlib
import http.server
import json
import pathlib
import re
import subprocess
import sys
import threading

import pyarrow
import pyarrow.parquet
import pytest

from ngrpo_jax.errors import UserError
from ngrpo_jax.tasks import builders
from ngrpo_jax.tasks.builders import catalogue, choices
from ngrpo_jax.tasks.datasets import load_problems

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


def problems(count, name="p"):
    return [
        {"problem": f"{name} {i}: what is ${i}+\\frac{{1}}{{2}}$?", "answer": str(i)} for i in range(count)
    ]


def science(count):
    """Rows with the columns of the public GPQA file."""
    return [
        {
            "Record ID": f"rec{i:03d}",
            "Question": f"Question {i}, with a comma,\nand a second line?",
            "Correct Answer": f"right {i}",
            **{f"Incorrect Answer {j}": f"wrong {i}.{j}" for j in (1, 2, 3)},
        }
        for i in range(count)
    ]


def write(path, rows):
    """A file of those rows, in the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(name, tmp_path, split="test"):
    source = f"tfds:{name}?data_dir={tmp_path / 'tfds'}&manual_dir={tmp_path / 'own'}"
    return load_problems(source, split=split, seed=0)


def refusal(name, tmp_path, split="test"):
    """The sentence of the refusal, on one line."""
    with pytest.raises(UserError) as caught:
        read(name, tmp_path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# From the user's files


@pytest.mark.parametrize(
    ("name", "file", "split", "rows"),
    [
        ("aime24", "aime24.jsonl", "test", problems(30)),
        ("aime25", "anything.csv", "test", problems(30)),
        ("amc23", "amc23.json", "test", problems(40)),
        ("math500", "math500.parquet", "test", problems(500)),
        ("gsm8k", "gsm8k_test.jsonl", "test", problems(1319)),
        ("gpqa_diamond", "gpqa_diamond.csv", "test", science(198)),
        ("deepscaler", "deepscaler.json", "train", problems(60)),
        ("deepscaler/subset", "deepscaler_subset.parquet", "train", problems(50)),
    ],
)
def test_every_set_is_built_from_a_local_file_and_read_back(name, file, split, rows, tmp_path, capsys):
    write(tmp_path / "own" / file, rows)
    found = read(name, tmp_path, split)
    assert len(found) == len(rows) and len({problem.id for problem in found}) == len(rows)
    if name != "gpqa_diamond":
        assert [(p.problem, p.answer) for p in found] == [(r["problem"], r["answer"]) for r in rows]
    printed = capsys.readouterr().out
    assert f"{split}: {len(rows)} problems of {len(rows)} rows of {file}" in printed
    assert ("the public source has 40315 rows" in printed) == (name == "deepscaler")
    assert read(name, tmp_path, split) == found and not capsys.readouterr().out


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not here")
@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("aime24", "test", 30),
        ("amc23", "test", 40),
        ("math500", "test", 500),
        ("gsm8k", "test", 1319),
        ("gsm8k", "train", 7473),
        ("deepscaler/subset", "train", 2058),
    ],
)
def test_the_real_files(name, split, count, tmp_path):
    (tmp_path / "own").symlink_to(SHARED)
    found = read(name, tmp_path, split)
    lines = (SHARED / f"{name.replace('/', '_')}{f'_{split}' * (name == 'gsm8k')}.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in lines.split("\n") if line]
    assert len(found) == count
    assert [p.problem for p in found] == [row["problem"] for row in rows]
    assert [p.answer for p in found] == [row["answer"].strip() for row in rows]


def test_public_field_names_become_ours(tmp_path):
    write(
        tmp_path / "own/aime24.jsonl",
        [{"id": 60, "problem": "p", "solution": "so \\boxed{ 204 }", "url": "u"}],
    )
    write(tmp_path / "own/amc23.jsonl", [{"id": 0, "question": "q", "answer": 27.0, "url": "u"}])
    row = {"problem": "r", "solution": "long", "answer": "\\pi", "unique_id": "test/algebra/1.json"}
    write(tmp_path / "own/math500.jsonl", [row])
    write(tmp_path / "own/gsm8k.jsonl", [{"question": "s", "answer": "1 and 2\n#### 1,234"}])
    found = [read(name, tmp_path)[0] for name in ("aime24", "amc23", "math500", "gsm8k")]
    assert [(p.id, p.problem, p.answer) for p in found] == [
        ("60", "p", "204"),
        ("0", "q", "27.0"),
        ("test/algebra/1.json", "r", "\\pi"),
        ("gsm8k-00001", "s", "1234"),
    ]


def test_the_file_itself_may_be_given_and_both_splits_of_gsm8k(tmp_path):
    file = write(tmp_path / "mine.csv", problems(3))
    assert len(builders.build("aime24", data_dir=tmp_path, manual_dir=file).as_data_source("test")) == 3
    write(tmp_path / "own/train.jsonl", problems(4))
    write(tmp_path / "own/gsm8k_test.jsonl", problems(2))
    assert (len(read("gsm8k", tmp_path, "train")), len(read("gsm8k", tmp_path, "test"))) == (4, 2)


def test_a_training_set_leaves_out_what_is_empty_or_repeated_and_counts_it(tmp_path, capsys):
    rows = problems(5)
    rows += [rows[1] | {"problem": rows[1]["problem"].replace(" ", "\n  ")}, {"problem": "p", "answer": None}]
    rows += [{"problem": " ", "answer": "3"}]
    write(tmp_path / "own/deepscaler.json", rows)
    assert [p.problem for p in read("deepscaler", tmp_path, "train")] == [r["problem"] for r in rows[:5]]
    assert (
        "5 problems of 8 rows of deepscaler.json, 1 repeated and 2 empty left out" in capsys.readouterr().out
    )
    counts = builders.build("deepscaler", data_dir=tmp_path / "tfds").info.metadata["splits"]["train"]
    assert (counts["nulls_dropped"], counts["duplicates_dropped"], counts["problems"]) == (2, 1, 5)


def test_source_and_licence_are_recorded(tmp_path):
    write(tmp_path / "own/aime24.jsonl", [row | {"licence": "CC0"} for row in problems(2)])
    read("aime24", tmp_path)
    info = builders.build("aime24", data_dir=tmp_path / "tfds").info
    assert info.metadata["source"] == "own file" and info.metadata["licence"] == "CC0"
    recorded = info.metadata["splits"]["test"]
    content = (tmp_path / "own/aime24.jsonl").read_bytes()
    assert recorded["sha256"] == hashlib.sha256(content).hexdigest()
    assert recorded["file"] == "aime24.jsonl"
    assert info.homepage == "https://huggingface.co/datasets/math-ai/aime24"


# Reproducible builds


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", builders.NAMES)
def test_building_twice_gives_the_same_bytes(name, tmp_path):
    rows = science(198) if name == "gpqa_diamond" else problems(40)
    own = write(tmp_path / "own" / f"{name}.csv", rows).parent
    for folder in ("a", "b"):
        builders.build(name, data_dir=tmp_path / folder, manual_dir=own)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") and files_of(tmp_path / "a")
    for path in files_of(tmp_path / "a"):
        assert filecmp.cmp(tmp_path / "a" / path, tmp_path / "b" / path, shallow=False), path


def test_processes_that_build_at_once_do_not_break_each_other(tmp_path):
    write(tmp_path / "own/gsm8k.jsonl", problems(1319))
    stale = tmp_path / "tfds/gsm8k/main/incomplete.killed_1.0.0"
    stale.mkdir(parents=True)
    code = (
        "import sys; from ngrpo_jax.tasks.datasets import load_problems; print(len(load_problems("
        "'tfds:gsm8k?data_dir=tfds&manual_dir=own', split='test', seed=0)), 'tensorflow' in sys.modules)"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    running = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
        for _ in range(3)
    ]
    ends = [process.communicate(timeout=300) for process in running]
    assert all(out.endswith("1319 False\n") for out, _ in ends), ends
    assert sum("built from" in out for out, _ in ends) == 1
    assert not stale.exists() and len(list((tmp_path / "tfds/gsm8k/main").iterdir())) == 1


def test_nothing_is_imported_before_a_set_is_wanted():
    code = "import sys, ngrpo_jax.tasks.datasets; print('tensorflow_datasets' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "False\n"


# Multiple choice


def test_letters_are_balanced_and_do_not_depend_on_the_order_of_rows():
    ids = [row["Record ID"] for row in science(198)]
    letters = dict(zip(ids, choices.balanced_letters(ids), strict=True))
    assert sorted(collections.Counter(letters.values()).values()) == [49, 49, 50, 50]
    turned = ids[::-1]
    assert dict(zip(turned, choices.balanced_letters(turned), strict=True)) == letters
    assert len({tuple(letters[i] for i in ids[n : n + 8]) for n in range(0, 192, 8)}) > 20  # no pattern


def test_the_right_answer_stands_under_its_letter(tmp_path):
    write(tmp_path / "own/gpqa_diamond.csv", science(60))
    orders = set()
    for i, problem in enumerate(read("gpqa_diamond", tmp_path)):
        question, _, options = problem.problem.partition("\n\n")
        assert question == f"Question {i}, with a comma,\nand a second line?" and problem.id == f"rec{i:03d}"
        by_letter = dict(line.split(") ") for line in options.split("\n"))
        assert list(by_letter) == list("ABCD") and by_letter[problem.answer] == f"right {i}"
        assert set(by_letter.values()) == {f"right {i}", *(f"wrong {i}.{j}" for j in (1, 2, 3))}
        orders.add(tuple(text.rpartition(".")[2] for text in by_letter.values() if "wrong" in text))
    assert len(orders) == 6


def test_a_choice_file_in_our_own_form_stays_as_it_is(tmp_path):
    write(tmp_path / "own/gpqa_diamond.jsonl", [{"id": "a", "problem": "q\n\nA) x\nB) y", "answer": "(b)"}])
    (problem,) = read("gpqa_diamond", tmp_path)
    assert (problem.problem, problem.answer) == ("q\n\nA) x\nB) y", "(b)")


# From the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client needs to download a file; `files`: path -> content."""

    def __init__(self, files, *args):
        self.files = files
        super().__init__(*args)

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.partition("?")[0]
        if "gpqa" in path:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = self.files.get(path)
        self.send_response(404 if content is None else 200)
        content = content or b""
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The content of a stand-in hub, to be filled, and the client set to use it."""
    from huggingface_hub import constants, utils

    files = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    utils.close_session()
    yield files
    utils.close_session()
    server.shutdown()
    server.server_close()


def publish(hub, name, rows_of_split, tmp_path):
    """Puts files into the stand-in hub, at the paths of the catalogue."""
    entry = next(iter(catalogue.configs(name).values()))
    for split, rows in rows_of_split.items():
        path = entry.splits[split].path
        content = write(tmp_path / "public" / name / path, rows).read_bytes()
        hub[f"/datasets/{entry.repository}/resolve/{entry.revision}/{path}"] = content
    return entry


def fetched(name, tmp_path, split):
    return load_problems(f"tfds:{name}?data_dir={tmp_path / 'tfds'}", split=split, seed=0)


def test_a_set_is_downloaded_once_from_its_public_home(hub, tmp_path):
    entry = publish(hub, "aime25", {"test": problems(30)}, tmp_path)
    found = fetched("aime25", tmp_path, "test")
    assert [p.answer for p in found] == [row["answer"] for row in problems(30)]
    info = builders.build("aime25", data_dir=tmp_path / "tfds").info
    assert info.metadata["source"] == f"huggingface.co/datasets/math-ai/aime25@{entry.revision}"
    hub.clear()
    assert fetched("aime25", tmp_path, "test") == found


def test_both_splits_are_downloaded(hub, tmp_path):
    publish(hub, "gsm8k", {"test": problems(1319), "train": problems(7473, "t")}, tmp_path)
    assert len(fetched("gsm8k", tmp_path, "test")) == 1319
    assert len(fetched("gsm8k", tmp_path, "train")) == 7473


def test_a_public_file_of_another_length_is_refused(hub, tmp_path):
    publish(hub, "aime25", {"test": problems(29)}, tmp_path)
    sentence = r"test\.jsonl has 29 rows, but the split 'test' of aime25 has 30 in its public source; fetch"
    with pytest.raises(ValueError, match=sentence):
        fetched("aime25", tmp_path, "test")
    assert not (tmp_path / "tfds/aime25/main/1.0.0").exists()


def test_a_file_that_the_hub_does_not_give_is_named(hub, tmp_path):
    with pytest.raises(UserError, match=r"gpqa_diamond is gated .*; accept its conditions at https://h"):
        fetched("gpqa_diamond", tmp_path, "test")
    with pytest.raises(UserError, match=r"aime24 cannot be downloaded from https://.*own file by manual_dir"):
        fetched("aime24", tmp_path, "test")
    with pytest.raises(
        ValueError, match=r"deepscaler/subset has no public repository; give your own file by manual_"
    ):
        fetched("deepscaler/subset", tmp_path, "train")


# What is refused


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{"problem": "p"}],
            "row 1: no field 'answer' (or solution), which math500 needs (fields here: problem)",
        ),
        ([{"answer": "1", "text": "p"}], "row 1: no field 'problem' (or question, prompt)"),
        ([{"problem": "p", "answer": None}], "row 1: field 'answer' is empty"),
        ([{"problem": " ", "answer": "1"}], "row 1: field 'problem' is empty"),
        ([{"id": 7, "problem": p, "answer": "1"} for p in "pq"], "row 2: row 1 has the id '7' too"),
        (["p"], "row 1: not an object"),
        ([{"problem": ["p"], "answer": "1"}], "row 1: field 'problem' is list, not text"),
    ],
)
def test_a_bad_row_is_named(rows, sentence, tmp_path):
    path = write(tmp_path / "own/math500.jsonl", rows)
    assert f"{path}, {sentence}" in refusal("math500", tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "a.csv",
            "problem,answer\np,é\n".encode("latin-1"),
            "a.csv is not UTF-8 text (invalid continuation byte in line 2)",
        ),
        ("a.jsonl", '\n{"problem": "é"}'.encode("latin-1"), "a.jsonl line 2 is not UTF-8 text"),
        ("a.json", '[{"problem": "é"}]'.encode("latin-1"), "a.json is not UTF-8 text"),
        ("a.csv", b"problem,answer\np,q,3\n", "a.csv, row 1: 3 fields where the header has 2"),
        ("a.csv", b'problem,answer\n"p,3\n', "a.csv, line 2: not CSV (unexpected end of data)"),
        ("a.json", b"[{]", "a.json is not JSON (Expecting property name"),
        ("a.json", b"[" * 100_000, "a.json is JSON nested too deeply"),
        ("a.jsonl", b"\n", "a.jsonl holds no problem"),
        ("a.parquet", b"PAR1", "a.parquet is not a readable parquet file"),
        ("a.txt", b"p", "holds no file for it; name it math500.* or math500_test.* or test.*, as one of"),
    ],
)
def test_a_bad_file_is_named(file, content, sentence, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / file).write_bytes(content)
    assert sentence in refusal("math500", tmp_path)


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    bad = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    (tmp_path / "own").mkdir()
    table = pyarrow.table({"problem": bad, "answer": ["1"]})
    pyarrow.parquet.write_table(table, tmp_path / "own/math500.parquet")
    assert "among rows 1 to 1 there is text that is not UTF-8" in refusal("math500", tmp_path)


def test_two_files_for_one_split_and_no_folder_are_refused(tmp_path):
    assert f"there is no folder {tmp_path / 'own'}" in refusal("math500", tmp_path)
    write(tmp_path / "own/math500.jsonl", problems(1))
    write(tmp_path / "own/math500.csv", problems(1))
    assert "math500.csv, math500.jsonl in" in refusal("math500", tmp_path)


def test_another_file_than_the_one_a_set_was_built_from_is_refused(tmp_path):
    path = write(tmp_path / "own/math500.jsonl", problems(3))
    read("math500", tmp_path)
    write(path, problems(4))
    assert "was built from another file than" in refusal("math500", tmp_path)
    (tmp_path / "tfds/math500/main/1.0.0").rename(tmp_path / "elsewhere")
    assert len(read("math500", tmp_path)) == 4


def test_a_choice_without_a_letter_is_refused(tmp_path):
    write(tmp_path / "own/gpqa_diamond.jsonl", [{"problem": "q", "answer": "E"}])
    assert "row 1: the answer 'E' is no letter from A to D" in refusal("gpqa_diamond", tmp_path)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("gsm8k", "unknown data source 'gsm8k'; write arithmetic, jsonl:PATH"),
        ("gsm8k", "(the nearest data set is tfds:gsm8k)"),
        ("tfds:math50", "no TFDS data set 'math50': neither prepared"),
        ("tfds:math50", "the nearest known name is math500"),
        ("tfds:gpqa", "the nearest known name is gpqa_diamond"),
        ("tfds:deepscaler/part", "has no configuration 'part'; it has main, subset"),
        ("tfds:math500:2.0.0?manual_dir={}/own", "math500 is at version 1.0.0, not 2.0.0"),
        ("tfds:math500?manual_dir={}/own&seed=1", "seed=1 is not understood"),
        ("tdfs:math500", "unknown kind of data source 'tdfs:math500'; did you mean tfds:math500?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(source, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    write(tmp_path / "own/math500.jsonl", problems(1))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_problems(source.format(tmp_path), split="test", seed=0)


def test_a_split_that_is_not_there_is_refused(tmp_path):
    write(tmp_path / "own/math500.jsonl", problems(1))
    assert "'math500' cannot give the split 'train'" in refusal("math500", tmp_path, "train")
