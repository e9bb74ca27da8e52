"""Mutated settings, data files and model directories, in one process that stops before anything is compiled.

Each is accepted, or refused in one sentence (UserError) in time; nothing else is raised, and nothing is left.
"""

import contextlib
import io
import json
import pathlib
import random
import shutil
import time

import jax
import numpy as np
import safetensors.numpy

from configs import tiny
from ngrpo_jax import flags
from ngrpo_jax.errors import UserError
from ngrpo_jax.model import decoder, hf
from ngrpo_jax.run import start
from ngrpo_jax.run.start import compose
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.problems import load_set
from ngrpo_jax.setup.tokenizer_info import make_tokenizer_info
from ngrpo_jax.setup.warm_start import warm_start_config
from ngrpo_jax.tasks import arithmetic, prompts

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 10.0
TRAIN = ("train", f"--config={ROOT / 'configs' / 'tiny.py'}")
SMALL = ("--config.data.train_size=20", "--config.eval.problems=5", "--config.reward.workers=1")
SMALL += ("--config.reward.deadline_s=2", f"--config.mesh.data={jax.device_count()}")
# Texts in the place of a setting: of each type, of none, at and beyond each end of a range.
VALUES = (
    *("0", "1", "-1", "2", "3", "7", "64", "1e-9", "0.5", "1.0", "1.5", "1e300", "-0.0", "inf", "nan"),
    *("None", "true", "false", "", " ", "()", "[]", "(1,2)", "(0,)", "('a',)", "[[1]]", "{}", "0x10", "1_0"),
    *(str(10**n) for n in (5, 9, 14, 23, 400)),
    *(str(2**31), str(2**31 - 1), str(2**63), "9" * 5000, "a" * 5000, "\0", "é", "\u202e", "../../x", "/"),
    *(
        "/dev/null",
        "jsonl:",
        "jsonl:/dev/null",
        "tfds:",
        "arithmetic:terms=0",
        "arithmetic:terms=99,digits=99",
    ),
    *("os:system", "warm-start", "plain", "math", "grpo", "none", "neighbor", "cosine", "(", "[", "%s"),
)


def settings(rng, folder):
    """A run of configs/tiny.py with one to three settings replaced, composed up to its warm start."""
    names = rng.sample(sorted(Settings.kinds()), rng.choice((1, 1, 1, 2, 3)))
    words = [f"--config.{name}={rng.choice(VALUES)}" for name in names if name != "eval.sets"]
    given = [
        "train",
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={folder / 'run'}",
        *SMALL,
        *words,
    ]

    def run():
        config, options = flags.parse_flags(given)
        checked = resolve(config)
        devices = mesh.make_mesh(checked.mesh.data, checked.mesh.fsdp, checked.mesh.tensor)
        with _no_warm_start():
            compose(checked, pathlib.Path(options["workdir"]), devices)

    return " ".join(words)[:300], run


def data(rng, folder):
    """A data file whose bytes or fields are changed, loaded as the problems of training or evaluation."""
    kind = rng.choice(("jsonl", "json", "csv"))
    path = folder / f"problems.{kind}"
    path.write_bytes(_bytes(rng, _file(rng, kind)))
    split, field = rng.choice((("train", "data.train"), ("test", "data.eval")))
    words = [f"--config.{field}={kind}:{path}", *SMALL]
    given = [*TRAIN, f"--workdir={folder / 'run'}", *words]

    def run():
        checked = resolve(flags.parse_flags(given)[0])
        problems = load_set(checked, prompts.load_tokenizer(arithmetic.TOKENIZER), split)
        assert len(problems.problems) == len(problems.prompts) > 0
        assert all(problem.problem.strip() and problem.answer.strip() for problem in problems.problems)

    return f"{split} of {path.name}", run


def model(rng, folder, made):
    """A model directory one of whose files is changed, read as a run reads it."""
    copy = folder / "model"
    shutil.copytree(made, copy)
    file = rng.choice(sorted(path for path in copy.iterdir() if path.suffix in (".json", ".safetensors")))
    how = rng.choice((_drop, _change_key, _change_key, _change_key, _damage, _change_tensor))
    said = how(rng, file)

    def run():
        checked = resolve(
            flags.parse_flags(["train", f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=x"])[0]
        )
        config = hf.check(copy)
        tokenizer = prompts.load_tokenizer(copy)
        make_tokenizer_info(tokenizer, config, checked)
        prompts.encode_prompt(tokenizer, "1+1=", checked.data.chat_template)
        _, params = hf.load(copy)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))

    return f"{how.__name__} {file.name} {said}"[:300], run


def outcome(run):
    """("accepted" | "refused" | "failed", what was said), and the seconds that it took."""
    begun, out = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            run()
        kind, said = "accepted", ""
    except UserError as error:
        kind, said = "refused", " ".join(str(error).split())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kind, said = "failed", f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begun
    if seconds > SECONDS:
        kind, said = "failed", f"{seconds:.0f} s: {said}"
    return kind, said


@contextlib.contextmanager
def _no_warm_start():
    whole, start.warm_start = start.warm_start, lambda *_: None
    try:
        yield
    finally:
        start.warm_start = whole


def _file(rng, kind):
    """A data file with some odd rows."""
    odd = (
        None,
        "",
        " ",
        3,
        -1.5,
        True,
        [],
        {},
        "x" * 10_000,
        "9" * 4000,
        "\\boxed{",
        "\0",
        "\ud800",
        "\u202e1",
        1e308,
    )
    rows = [{"problem": f"{i}+{i}=", "answer": str(2 * i)} for i in range(rng.choice((1, 3, 12)))]
    for _ in range(rng.choice((0, 0, 1, 2))):
        row = rng.choice(rows)
        change = rng.choice(("problem", "answer", "id", "drop", "both"))
        if change == "drop":
            row.pop(rng.choice(("problem", "answer")), None)
        elif change == "both":
            rows[rows.index(row)] = rng.choice(odd)
            break
        else:
            row[change] = rng.choice(odd)
    if kind == "csv":
        lines = ["problem,answer"] + [
            ",".join(map(str, r.values())) if isinstance(r, dict) else str(r) for r in rows
        ]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind == "json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _bytes(rng, content):
    """The bytes, or with a part removed, repeated or changed."""
    content = bytearray(content)
    if rng.random() < 0.5 or not content:
        return bytes(content)
    at, size = rng.randrange(len(content)), rng.choice((1, 1, 8, 100))
    match rng.randrange(5):
        case 0:
            del content[at : at + size]
        case 1:
            content[at:at] = content[at : at + size]
        case 2:
            content[at : at + size] = rng.randbytes(size)
        case 3:
            del content[at:]
        case 4:
            content[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n\n", b"["))
    return bytes(content)


def _drop(rng, file):
    file.unlink()
    return ""


def _damage(rng, file):
    content = file.read_bytes()
    file.write_bytes(_bytes(rng, content) if rng.random() < 0.8 else b"")
    return ""


def _change_key(rng, file):
    if file.suffix != ".json":
        return _damage(rng, file)
    values = json.loads(file.read_text())
    key = rng.choice(sorted(values))
    values[key] = rng.choice((None, -1, 0, 1, 3, 2**40, 1e300, "", "x", [], [1], {}, {"a": 1}, True, False))
    file.write_text(json.dumps(values))
    return f"{key}={values[key]!r}"


def _change_tensor(rng, file):
    file = file.parent / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = rng.choice(sorted(tensors))
    match rng.randrange(4):
        case 0:
            del tensors[name]
        case 1:
            tensors[name].reshape(-1)[rng.randrange(tensors[name].size)] = rng.choice((np.nan, np.inf))
        case 2:
            tensors[name] = tensors[name][:-1]
        case 3:
            tensors[name] = tensors[name].astype(rng.choice((np.int32, np.float64, np.float16)))
    safetensors.numpy.save_file(tensors, file)
    return name


WAYS = ("accepted", "refused", "failed")
KINDS = {"settings": (settings, 500), "data": (data, 500), "models": (model, 200)}


def make_model(folder):
    """A small model directory, as a warm start would leave it."""
    tokenizer, config = prompts.load_tokenizer(arithmetic.TOKENIZER), tiny.get_config()
    config.warm_start.update(num_layers=2, hidden_size=32, intermediate_size=48)
    made = warm_start_config(resolve(config).warm_start, tokenizer)
    hf.save(folder, made, decoder.init(jax.random.key(0), made), tokenizer_from=arithmetic.TOKENIZER)
    return folder


def one(kind, seed, folder, made):
    """(what was changed, outcome, what was said) of one mutation; what it leaves behind is a failure."""
    rng = random.Random(f"{kind} {seed}")
    folder.mkdir(parents=True)
    try:
        what, run = model(rng, folder, made) if kind == "models" else KINDS[kind][0](rng, folder)
        result, said = outcome(run)
        if (folder / "run").exists():
            result, said = "failed", f"left behind: {list((folder / 'run').iterdir())}; {said}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return what, result, said
