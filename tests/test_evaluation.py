"""evaluate on a very small model: several sets, interrupted and resumed, read again, compared, refused."""

import json
import pathlib
import re

import numpy as np
import pytest

from ngrpo_jax import evaluate, flags
from ngrpo_jax.evaluation import answering, generations, runner, writer
from ngrpo_jax.evaluation.sets import EvalSet
from ngrpo_jax.preflight import capacity
from ngrpo_jax.report import __main__ as report
from ngrpo_jax.report.embeddings import visible
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.policy import evaluation_keys
from ngrpo_jax.setup.problems import ProblemSet
from ngrpo_jax.tasks.datasets import Problem

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"
SMALL = {
    "eval.samples": 3,
    "eval.pass_k": "(1,3)",
    "eval.problems": 5,
    "eval.max_new_tokens": 8,
    "rollout.slots": 8,
    "rollout.chunk": 4,
    "data.max_prompt_tokens": 24,
    "mesh.data": 8,
    "reward.kind": "own_reward:odd_length",
}
CHOICES = [{"id": f"c{i}", "problem": f"{i}+{i}=", "answer": "AB"[i % 2]} for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory of random weights with the arithmetic tokenizer."""
    import jax

    from ngrpo_jax.model import decoder, hf
    from ngrpo_jax.setup.warm_start import warm_start_config
    from ngrpo_jax.tasks import arithmetic, prompts

    folder = tmp_path_factory.mktemp("model")
    config = flags.load_config(str(TINY))
    config.warm_start.num_layers, config.warm_start.hidden_size = 1, 32
    config.warm_start.intermediate_size = 48
    sizes = warm_start_config(resolve(config).warm_start, prompts.load_tokenizer(arithmetic.TOKENIZER))
    params = decoder.init(jax.random.key(1), sizes)
    hf.save(str(folder / "model"), sizes, params, tokenizer_from=arithmetic.TOKENIZER)
    return folder / "model"


def _run(model, workdir, *words, **changes):
    settings = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    argv = ["evaluate", f"--config={TINY}", f"--workdir={workdir}", f"--config.model.path={model}"]
    flags.run_command(evaluate.main, [*argv, *overrides, *words])


def _stored(*arguments):
    flags.run_command(evaluate.main, ["evaluate", *map(str, arguments)])


def _refused(capsys, call, *arguments, **changes):
    with pytest.raises(SystemExit) as refusal:
        call(*arguments, **changes)
    assert refusal.value.code == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def _tables(printed):
    """The tables of metrics, which a rerun must print again."""
    return printed[printed.index("arithmetic, step") :].replace("\n\n", "\n")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(workdir, its file) of an evaluation that was not interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    _run(model, workdir)
    return workdir, workdir / "generations_0_arithmetic.jsonl"


def test_keys_depend_on_seed_set_problem_and_sample_alone():
    import jax

    def data(*arguments):
        return np.asarray(jax.random.key_data(evaluation_keys(*arguments)))

    everything = data(0, "aime25", range(6), 4).reshape(6, 4, 2)
    np.testing.assert_array_equal(data(0, "aime25", range(2, 5), 4).reshape(3, 4, 2), everything[2:5])
    np.testing.assert_array_equal(data(0, "aime25", range(6), 2).reshape(6, 2, 2), everything[:, :2])
    others = [everything, data(1, "aime25", range(6), 4), data(0, "amc23", range(6), 4)]
    flat = np.concatenate([keys.reshape(-1, 2) for keys in others])
    assert len(np.unique(flat, axis=0)) == len(flat)


@pytest.mark.parametrize("slots", [1, 16])
def test_the_size_of_a_batch_changes_no_response(slots, whole, model, tmp_path):
    """Two problems a batch with one slot; all five in one with sixteen, and with the eight of `whole`."""
    _run(model, tmp_path, rollout__slots=slots)
    assert (tmp_path / "generations_0_arithmetic.jsonl").read_bytes() == whole[1].read_bytes()


def test_batches_cover_the_rest_once_and_evenly():
    for first, count, size in [(0, 30, 16), (7, 30, 5), (29, 30, 100), (30, 30, 4), (0, 1, 1)]:
        parts = runner.batches(first, count, size)
        assert [i for part in parts for i in part] == list(range(first, count))
        lengths = [len(part) for part in parts]
        assert all(0 < length <= size for length in lengths)
        assert not lengths or max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("cut", ["in a line", "between the rows of a problem", "in the header", "nonsense"])
def test_an_interrupted_evaluation_ends_as_one_that_was_not(cut, whole, model, tmp_path, capsys):
    lines = whole[1].read_bytes().split(b"\n")
    torn = {
        "in a line": b"\n".join(lines[:8]) + b"\n" + lines[8][:40],
        "between the rows of a problem": b"\n".join(lines[:9]) + b"\n",
        "in the header": lines[0][:50],
        "nonsense": b"\n".join(lines[:4]) + b"\n\x00\x00\n",
    }[cut]
    (tmp_path / whole[1].name).write_bytes(torn)
    _run(model, tmp_path)
    resumed = capsys.readouterr().out
    assert ("done already" in resumed) == (cut != "in the header")
    assert (tmp_path / whole[1].name).read_bytes() == whole[1].read_bytes()
    _stored("--from", whole[1])
    again = capsys.readouterr().out
    assert _tables(again).replace(str(whole[0]), "") == _tables(resumed).replace(str(tmp_path), "")


def test_finished_problems_are_not_done_again(whole, model, capsys, monkeypatch):
    before = whole[1].stat().st_mtime_ns
    monkeypatch.setattr(answering, "write_responses", lambda *_, **__: pytest.fail("it wrote again"))
    _run(model, whole[0])
    assert "5 of them done already" in capsys.readouterr().out
    assert whole[1].stat().st_mtime_ns == before


def test_the_speed_of_grading_is_told(model, tmp_path, capsys):
    _run(model, tmp_path, eval__problems=2)
    told = re.search(r"graded at ([\d.]+)[ kM]+verdicts/s, (\d+) without a verdict", capsys.readouterr().out)
    assert told and float(told[1]) > 0 and told[2] == "0"


def test_a_row_has_tokens_flags_and_the_verdict(whole):
    rows = [json.loads(line) for line in whole[1].read_text().split("\n")[1:-1]]
    assert [(row["id"], row["sample"]) for row in rows][:4] == [
        *((rows[0]["id"], sample) for sample in range(3)),
        (rows[3]["id"], 0),
    ]
    for row in rows:
        assert len(row["token_ids"]) == row["tokens"] <= 8 and row["mixed_at"] == []
        assert row["reward"] == len(row["response"]) % 2


def test_stored_generations_give_the_metrics_of_the_run_and_of_new_grading(whole, model, capsys):
    _run(model, whole[0])
    at_run_time = capsys.readouterr().out
    _stored("--from", whole[1])
    assert _tables(capsys.readouterr().out) == _tables(at_run_time)
    _stored("--from", whole[0], "--regrade")
    regraded = capsys.readouterr().out
    assert "graded anew: 0 of 15 verdicts changed" in regraded and _tables(regraded) == _tables(at_run_time)
    _stored("--from", whole[1], "--pass_k=2")
    assert "Pass@2" in capsys.readouterr().out
    rewards = [json.loads(line)["reward"] for line in whole[1].read_text().split("\n")[1:-1]]
    mean = float(re.search(r"Mean@3 +([\d.]+)", at_run_time)[1])
    assert mean == pytest.approx(np.mean(rewards), abs=5e-5)


def test_several_sets_each_with_its_own_samples_prompt_and_reward(model, tmp_path, capsys):
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    sets = f"arithmetic; jsonl:{path} prompt=choice reward=choice samples=2 pass_k=2 problems=3"
    _run(model, tmp_path / "w", f"--sets={sets}", data__max_prompt_tokens=200, train__row_tokens=256)
    printed = capsys.readouterr().out
    assert "arithmetic: Mean@3 / Pass@1 / Pass@3" in printed and "choices: Mean@2 / Pass@2" in printed
    assert 'responses with no "Answer: X"' in printed and "average" not in printed
    stored = generations.read(tmp_path / "w" / "generations_0_choices.jsonl")
    assert [len(rows) for rows in stored.problems] == [2, 2, 2]
    assert stored.header["depends"]["reward.kind"] == "choice" and stored.pass_k == (2,)
    assert {"Mean@2", "best@2"} <= set(re.findall(r"\w+@\d", printed))


def test_mixing_at_evaluation_records_where_and_how_near(model, tmp_path, capsys):
    _run(model, tmp_path, eval__mixing=True, mixing__rate=1.0, mixing__until=None)
    printed = capsys.readouterr().out
    stored = generations.read(tmp_path / "generations_0_arithmetic.jsonl")
    rows = [row for group in stored.problems for row in group]
    assert all(row["mixed_at"] == list(range(row["tokens"])) for row in rows)
    assert all(len(row["cosines"]) == row["tokens"] for row in rows)
    flat = np.concatenate([row["cosines"] for row in rows])
    assert stored.cosines() == {
        "mean": flat.mean(),
        "min": flat.min(),
        "below_095": np.mean(flat < 0.95),
    }
    assert flat.min() < 0.999 and "cosine of mixed inputs to anchors, share below 0.95" in printed


def _edited(whole, tmp_path, flip):
    """A copy of the generations with the verdicts of some problems flipped; returns its workdir."""
    header, *rows = [json.loads(line) for line in whole[1].read_text().split("\n")[:-1]]
    numbers = list(dict.fromkeys(row["id"] for row in rows))
    for row in rows:
        row["reward"] = float(numbers.index(row["id"]) in flip)
    tmp_path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in [header, *rows])
    (tmp_path / whole[1].name).write_text(text)
    return tmp_path


def test_compare_prints_the_paired_table(whole, tmp_path, capsys):
    a, b = _edited(whole, tmp_path / "a", {0, 1}), _edited(whole, tmp_path / "b", {1, 2, 3})
    for runs in ((a, b), (a / whole[1].name, b / whole[1].name)):
        _stored("--compare", *runs)
        printed = capsys.readouterr().out
        counts = dict(re.findall(r"(both|only A|only B|neither) +(\d+)", printed))
        assert counts == {"both": "1", "only A": "1", "only B": "2", "neither": "1"}
        assert "p = 1 (1 against 2)" in printed and "+20.00 points" in printed


def test_compare_counts_as_many_samples_of_both(whole, tmp_path, capsys):
    """A has one correct sample of three, the last: with the two samples of B it solves nothing."""
    header, *rows = [json.loads(line) for line in whole[1].read_text().split("\n")[:-1]]
    paths = tmp_path / "three.jsonl", tmp_path / "two.jsonl"
    for path, samples in zip(paths, (3, 2), strict=True):
        header["depends"]["eval.samples"] = samples
        written = [header, *({**row, "reward": row["sample"] / 2} for row in rows if row["sample"] < samples)]
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
    _stored("--compare", *paths)
    printed = capsys.readouterr().out
    assert "5 problems, 2 samples each" in printed
    assert dict(re.findall(r"(both|only A|only B|neither) +(\d+)", printed))["neither"] == "5"


def test_what_cannot_be_read_or_compared_is_one_sentence(whole, tmp_path, capsys):
    assert "nowhere.jsonl" in _refused(capsys, _stored, "--from", "nowhere.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text('{"problem": "1+1", "answer": "2"}\n')
    assert "line 1 is no header" in _refused(capsys, _stored, "--from", other)
    lines = whole[1].read_text().split("\n")
    for index, line, words in [
        (3, "{", "line 4 is not JSON"),
        (2, '{"id": "x"}', "line 3 has no sample"),
        (4, lines[5], "line 5 is sample 1"),
    ]:
        other.write_text("\n".join([*lines[:index], line, *lines[index + 1 :]]))
        assert words in _refused(capsys, _stored, "--from", other)
    assert "Pass@9 needs 9" in _refused(capsys, _stored, "--from", whole[1], "--pass_k=9")
    assert "expected 2 arguments" in _refused(capsys, _stored, "--compare", whole[0])
    (tmp_path / "empty").mkdir()
    assert "run evaluate" in _refused(capsys, _stored, "--compare", whole[0], tmp_path / "empty")
    assert "unrecognized arguments: --stray" in _refused(capsys, _stored, "--from", whole[1], "--stray")
    both = _refused(capsys, _stored, "--from", whole[1], "--compare", whole[1], whole[1])
    assert "not allowed with argument --from" in both


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"eval__pass_k": "(1,4)"}, (), "eval.pass_k is 4 but eval.samples is 3"),
        (
            {},
            ("--sets=arithmetic samples=2",),
            "arithmetic samples=2': eval.pass_k is 3 but eval.samples is 2",
        ),
        ({}, ("--sets=arithmetic sample=2",), "did you mean samples=?"),
        ({}, ("--sets=arithmetic samples=two",), "eval.samples is 'two'; it must be a whole number"),
        ({}, ("--sets=arithmetic name=a.b",), "name is 'a.b'; it must be of letters, digits"),
        ({}, ("--sets=arithmetic; arithmetic",), "two sets called 'arithmetic'"),
        ({}, ("--sets=arithmetic;;x",), "empty entry"),
        ({}, ("--sets=arithmetic prompt=maths",), "data.prompt is 'maths'"),
        ({"reward__kind": "math"}, ("--sets=tfds:gpqa_diamond prompt=choice",), "is multiple choice, but"),
        ({}, ("--sets=tfds:gpqa_diamond?manual_dir=x prompt=math",), "set both to choice"),
        ({"eval__max_new_tokens": 5000}, (), "the model has 4096 positions"),
        ({"eval__temperature": 0.5}, (), "eval.temperature 1.0, not 0.5"),
        ({"seed": 3}, (), "seed 0, not 3"),
        ({"eval__problems": 4}, (), "problems "),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(changes, given, words, whole, model, capsys):
    before = whole[1].read_bytes()
    assert words in _refused(capsys, _run, model, whole[0], *given, **changes)
    assert whole[1].read_bytes() == before


def test_a_reward_that_ends_the_process_is_one_sentence_with_the_responses_id(model, tmp_path, capsys):
    sentence = _refused(capsys, _run, model, tmp_path / "run", reward__kind="own_reward:leave")
    assert re.search(
        r"the reward 'own_reward:leave' of response arithmetic:\S+/1 failed \(SystemExit: 0\)", sentence
    )


def test_an_evaluation_that_does_not_fit_is_refused(model, tmp_path, capsys, monkeypatch):

    monkeypatch.setattr(capacity, "device_memory", lambda *_, **__: 1000)
    assert "on each device, which has" in _refused(capsys, _run, model, tmp_path)


def test_the_header_depends_on_problems_their_prompts_and_their_answers():
    settings = resolve(flags.load_config(str(TINY)))

    def depends(ids, answer):
        problems = ProblemSet([Problem("a", "1+1=", answer)], [ids], 0)
        return writer.make_header(EvalSet("sums", settings), problems, 3, "digest")["depends"]

    first = depends([1, 2], "2")
    assert depends([1, 2], "2") == first
    for other in (depends([1, 3], "2"), depends([1, 2], "3")):
        assert {name for name in first if first[name] != other[name]} == {"problems"}


def _reported(capsys, *arguments):
    """(exit status, standard output, standard error) of the report command."""
    status = 0
    try:
        flags.run_command(report.main, ["report", *map(str, arguments)])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_report_lists_neighbours_and_draws_the_plane(model, tmp_path, capsys):
    settings = [f"--config={TINY}", f"--workdir={tmp_path}", f"--config.model.path={model}"]
    settings.append("--config.mesh.data=8")
    status, out, _ = _reported(capsys, "neighbors", "--tokens=7, +", "--count=3", *settings)
    assert status == 0 and "cosine in the embedding, k 3: the first 2 are mixed in" in out
    lines = out.rstrip().split("\n")
    assert [line.split()[0] for line in lines[-2:]] == ["7", "+"] and lines[-1].count(".") == 3
    status, out, _ = _reported(capsys, "pca", "--tokens", "7,+", *settings)
    page = (tmp_path / "pca.html").read_text()
    assert status == 0 and "pca.html" in out and "<svg" in page and "neighbour mixing" in page
    status, _, err = _reported(capsys, "neighbors", "--tokens=77", *settings)
    assert status == 2 and "'77' is several tokens" in err and err.count("\n") == 1
    status, _, err = _reported(capsys, "neighbors", *settings)
    assert status == 2 and "--tokens is missing" in err
    status, _, err = _reported(capsys, "neighbours", *settings)
    assert status == 2 and "it has compare, neighbors, pca, diversity" in err


def test_no_token_is_listed_unseen():
    assert visible(" a\n\t") == "␣a⏎⇥" and visible("\x0c\u00a0é") == "\\x0c\\xa0é" and visible("") == ""


def test_report_measures_the_diversity_of_stored_groups(whole, tmp_path, capsys):
    status, out, _ = _reported(capsys, "diversity", whole[0])
    assert status == 0 and "arithmetic, step 0" in out
    row = out.split("\n")[2].split()
    found = dict(zip(("problems", "samples"), map(int, row[3:5]), strict=True))
    assert found == {"problems": 5, "samples": 3}
    groups = generations.read(whole[1]).problems
    ones = [[row["token_ids"] for row in rows] for rows in groups]
    expected = np.mean([len({t for r in g for t in r}) / sum(map(len, g)) for g in ones])
    assert float(row[5]) == pytest.approx(expected, abs=5e-4)
    status, _, err = _reported(capsys, "diversity", tmp_path)
    assert status == 2 and "has no generations_*.jsonl" in err
