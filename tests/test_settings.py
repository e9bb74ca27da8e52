"""Settings: every config resolves, every leaf is read, and what cannot be right is refused by name."""

import ast
import dataclasses
import json
import pathlib

import pytest

from configs import base
from ngrpo_jax import evaluate, export, flags, settings_text
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.algo.objectives import LossConfig
from ngrpo_jax.errors import UserError
from ngrpo_jax.former_settings import REMOVED
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout.request import SamplingParams
from ngrpo_jax.settings import Settings, resolve

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_every_config_resolves_and_says_how_it_is_run(path):
    settings = resolve(flags.load_config(str(path)))
    assert settings.rollout.group >= 2
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if path.stem != "base":
        for word in (f"--config={path.relative_to(ROOT).as_posix()}", "ardware", "Expect"):
            assert word in text, f"{path.name}: its docstring does not say {word}"


def test_configs_are_found_by_name_path_and_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flags.load_config("tiny").model.path == "warm-start"
    assert flags.load_config("released/ngrpo_1_5b").mixing.weights == "probs"
    # A file that a config names is found beside it.
    assert pathlib.Path(flags.load_config("smollm2").data.chat_template).is_file()
    own = tmp_path / "own.py"
    own.write_text(
        "from configs import base\n\ndef get_config(rate='0.2'):\n"
        "    config = base.get_config()\n    config.mixing.rate = float(rate)\n    return config\n"
    )
    assert flags.load_config("own.py").mixing.rate == 0.2
    assert flags.load_config("own.py:0.7").mixing.rate == 0.7
    with pytest.raises(UserError, match="takes no argument"):
        flags.load_config("tiny:fast")
    with pytest.raises(UserError, match=r"'tinx' does not exist; give a path, or one of .*tiny"):
        flags.load_config("tinx")


def test_the_settings_of_a_run_are_read_from_its_workdir(tmp_path):
    config = flags.load_config("tiny")
    config.eval.pass_k = (2, 4)
    tree = config.to_dict()
    tree["rollout"] |= {"top_p": 1.0, "group": 6}  # a setting that has been removed, at its last default
    (tmp_path / "config.json").write_text(json.dumps(tree))
    argv = ["evaluate", f"--workdir={tmp_path}", "--config.seed=7"]
    settings = resolve(flags.parse_flags(argv, of_run=True)[0])
    assert (settings.eval.pass_k, settings.rollout.group, settings.seed) == ((2, 4), 6, 7)
    assert settings.train.steps == 36  # as the run had it
    with pytest.raises(UserError, match=r"--config=configs/NAME\.py is missing"):
        flags.parse_flags(["train", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match=r"has no config\.json"):
        flags.parse_flags(["evaluate", f"--workdir={tmp_path / 'none'}"], of_run=True)


def test_an_unknown_flag_names_the_settings_that_end_so():
    with pytest.raises(UserError, match=r"--config\.train\.steps or --config\.warm_start\.steps\?"):
        flags.parse_flags(["train", "--config", "tiny", "--workdir=w", "--steps=3"])


def test_docs_settings_is_made_from_the_declarations():
    text = settings_text.as_markdown()
    assert text == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), (
        "make it again: python -m ngrpo_jax.settings_text > docs/settings.md"
    )
    for name in Settings.kinds():
        assert f"| `{name}`" in text


def test_help_fits_a_terminal_and_has_every_setting():
    text = settings_text.for_terminal()
    assert max(map(len, text.splitlines())) <= 110
    assert all(f"  {name}=" in text for name in Settings.kinds())


@pytest.mark.parametrize("command", [evaluate, export])
def test_what_a_command_reads_are_settings(command):
    """A name of SETTINGS_READ that no setting begins with is a mistake, such as one that was renamed."""
    for start in command.SETTINGS_READ:
        assert any(name.startswith(start) for name in Settings.kinds()), start


SECTIONS = {
    field.name: type(field.default)
    for field in dataclasses.fields(Settings)
    if dataclasses.is_dataclass(field.default)
}


def _section_of(node, known):
    """The section that an expression stands for: `ANYTHING.rollout`, or a name that is known to be one."""
    if isinstance(node, ast.Attribute) and node.attr in SECTIONS:
        return node.attr
    return known.get(node.id) if isinstance(node, ast.Name) else None


def _reads(function, known):
    """Settings that a function reads, as SECTION.NAME: from a section that it was given or has a name for."""
    classes = {kind.__name__: name for name, kind in SECTIONS.items()}
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id in classes:
            known[argument.arg] = classes[argument.annotation.id]
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = (
                zip(target.elts, value.elts, strict=True) if _unpacks(target, value) else [(target, value)]
            )
            for name, expression in pairs:
                if isinstance(name, ast.Name) and (section := _section_of(expression, known)):
                    known[name.id] = section
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and (section := _section_of(node.value, known)):
            yield f"{section}.{node.attr}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node).endswith("settings.seed"):
            yield "seed"


def _unpacks(target, value):
    return isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)


def _functions(tree, section=None):
    """Every function of a file, with the section that it is a method of. `rules` do not count as a use."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "rules":
            yield node, {"self": section} if section else {}
        names = [name for name, kind in SECTIONS.items() if kind.__name__ == getattr(node, "name", None)]
        yield from _functions(node, names[0] if names else section)


def test_every_setting_is_read_somewhere():
    read = set()
    for path in (ROOT / "ngrpo_jax").rglob("*.py"):
        for function, known in _functions(ast.parse(path.read_text(encoding="utf-8"))):
            read |= set(_reads(function, known))
    handed_on = (
        ("mixing", Mixing),
        ("objective", LossConfig),
        ("warm_start", ModelConfig),
        ("rollout", SamplingParams),
        ("eval", SamplingParams),
    )
    for section, target in handed_on:
        assert f"{section}.select" in read  # which hands settings on by the names of the target's fields
        read |= {f"{section}.{field.name}" for field in dataclasses.fields(target)}
    unread = sorted(set(Settings.kinds()) - read)
    assert not unread, f"nothing reads {', '.join(unread)}"


def test_base_is_the_papers_table_of_hyperparameters():
    settings = resolve(base.get_config())
    assert (settings.mixing.k, settings.mixing.rate, settings.rollout.temperature) == (3, 0.1, 0.7)
    assert (settings.optimizer.learning_rate, settings.objective.kl_coef) == (1e-6, 0.001)
    assert (settings.rollout.prompts, settings.rollout.group, settings.train.mini_batch_prompts) == (
        64,
        4,
        16,
    )
    objective, optimizer = settings.objective, settings.optimizer
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.2, 0.2, 3.0)
    assert (optimizer.clip_norm, optimizer.weight_decay, optimizer.warmup_steps) == (1.0, 0.01, 0)
    assert (objective.kl_estimator, objective.aggregate, objective.scale_by_std) == ("k3", "sequence", True)
    assert (settings.mixing.metric, settings.mixing.table, settings.mixing.until) == (
        "cosine",
        "embedding",
        "</think>",
    )
    assert (settings.mixing.weights, settings.mixing.token) == ("logits", "anchor")
    assert (settings.checkpoint.best_metric, settings.data.eval) == ("mean_at_n", "tfds:aime24")
    assert settings.train.steps * settings.rollout.prompts == 40_000 and not settings.eval.mixing
    assert (settings.eval.max_new_tokens, settings.eval.pass_k) == (8192, (16, 32))
    assert (settings.data.max_prompt_tokens, settings.rollout.max_new_tokens) == (4096, 8192)
    assert (settings.eval.samples, settings.eval.temperature, settings.eval.top_p) == (32, 0.6, 0.95)


@pytest.mark.parametrize(
    ("leaf", "value", "sentence"),
    [
        ("mixing.rate", 1.5, "mixing.rate is 1.5; it must be between 0 and 1."),
        ("mixing.k", 0, "mixing.k is 0; it must be above 0."),
        ("mixing.metric", "angle", "mixing.metric is 'angle'; it must be one of cosine, l2, l1, dot."),
        ("mixing.strategy", "blend", "mixing.strategy is 'blend'; it must be one of "),
        ("mixing.table", "output", "mixing.table is 'output'; it must be one of embedding, head."),
        ("mixing.weights", "softmax", "mixing.weights is 'softmax'; it must be one of logits, probs."),
        ("mixing.token", "argmax", "mixing.token is 'argmax'; it must be one of anchor, sampled."),
        ("mixing.sigma", -1.0, "mixing.sigma is -1.0; it must be 0 or above."),
        (
            "mixing.keep_out",
            "",
            "mixing.keep_out is ''; it must be a text that is not empty: every token matches that, or None.",
        ),
        ("objective.kl_estimator", "k4", "objective.kl_estimator is 'k4'; it must be one of k1, k2, k3"),
        (
            "objective.overlong",
            "drop",
            "objective.overlong is 'drop'; it must be one of keep, mask, penalize",
        ),
        (
            "objective.overlong_interval",
            100,
            "objective.overlong_interval is 100 with objective.overlong 'keep'",
        ),
        ("objective.overlong_penalty", 0.0, "objective.overlong_penalty is 0.0"),
        (
            "objective.old_logprobs",
            "actor",
            "objective.old_logprobs is 'actor'; it must be one of learner, sampler",
        ),
        ("objective.importance_cap", 0.0, "objective.importance_cap is 0.0; it must be above 0, or None"),
        ("objective.entropy_coef", -0.1, "objective.entropy_coef is -0.1"),
        ("rollout.group", 1, "rollout.group is 1"),
        ("rollout.temperature", 0.0, "rollout.temperature is 0.0"),
        ("rollout.prompts", 63, "rollout.prompts is 63, no multiple of train.mini_batch_prompts 16"),
        ("train.row_tokens", 100, "train.row_tokens is 100, shorter than the longest sequence"),
        ("train.remat", "some", "train.remat is 'some'; it must be one of none, full, dots"),
        ("eval.pass_k", (1, 64), "eval.pass_k is 64 but eval.samples is 32"),
        ("eval.pass_k", (), "eval.pass_k is ()"),
        ("eval.pass_k", (0, 4), "eval.pass_k is (0, 4)"),
        ("checkpoint.best_metric", "loss", "checkpoint.best_metric is 'loss'; it must be one of mean_at_n"),
        ("train.attention", "fast", "train.attention is 'fast'; it must be one of auto, plain, chunked"),
        (
            "train.offload",
            "all",
            "train.offload is 'all'; it must be one of none, optimizer, reference, both",
        ),
        ("objective.algorithm", "ppo", "objective.algorithm is 'ppo'"),
        ("objective.dual_clip", 1.0, "objective.dual_clip is 1.0"),
        ("model.dtype", "float8", "model.dtype is 'float8'"),
        ("mesh.tensor", 0, "mesh.tensor is 0"),
        ("warm_start.num_heads", 5, "warm_start.hidden_size 192 is no multiple of warm_start.num_heads 5"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate is 0.0"),
        (
            "optimizer.learning_rate",
            float("inf"),
            "optimizer.learning_rate is inf; it must be a finite",
        ),
        ("objective.kl_coef", float("nan"), "objective.kl_coef is nan; it must be a finite number"),
        ("reward.memory_mb", 64, "reward.memory_mb is 64; it must be 128 or above."),
        ("seed", -1, "seed is -1"),
    ],
)
def test_a_wrong_value_is_one_sentence_naming_the_setting(leaf, value, sentence):
    config = base.get_config()
    section, _, name = leaf.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValueError) as refusal:
        resolve(config)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"mixing.strategy": "soft", "mixing.table": "head"},
            "mixing.table is 'head', which mixing.strategy 'soft' does not use; leave it at 'embedding'.",
        ),
        (
            {"mixing.strategy": "noise", "mixing.token": "sampled"},
            "mixing.token is 'sampled', which",
        ),
        (
            {"mixing.strategy": "gumbel", "mixing.distinct_spelling": True},
            "mixing.distinct_spelling is True, which",
        ),
        (
            {"lora.targets": "attention"},
            "lora.targets is 'attention' without lora.rank, so that there are no adapters; set lora.rank,",
        ),
        (
            {"objective.old_logprobs": "sampler", "objective.importance_cap": 2.0},
            "objective.importance_cap is set with objective.old_logprobs 'sampler'",
        ),
        (
            {"objective.overlong": "penalize", "objective.overlong_interval": 8192},
            "objective.overlong_interval is 8192; it must be below rollout.max_new_tokens 8192",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(changes, sentence):
    config = base.get_config()
    for leaf, value in changes.items():
        section, _, name = leaf.partition(".")
        config[section][name] = value
    with pytest.raises(ValueError) as refusal:
        resolve(config)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_gspo_with_token_means_is_refused():
    config = base.get_config()
    config.objective.algorithm, config.objective.aggregate = "gspo", "token"
    with pytest.raises(ValueError, match=r"objective.aggregate is 'token' with objective.algorithm 'gspo'"):
        resolve(config)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--config.rollout.grup=4"],
            "unknown setting --config.rollout.grup; did you mean --config.rollout.group?",
        ),
        (
            ["--config.optimizer.lr=1"],
            "unknown setting --config.optimizer.lr; did you mean --config.optimizer.learning_rate?",
        ),
        (["--config.optimizer.zz=1"], "unknown setting --config.optimizer.zz."),
        (["--config.optimzer.learning_rat=1"], "did you mean --config.optimizer.learning_rate?"),
        (["--config.mixing.rate=often"], "mixing.rate is 'often'; it must be a finite number."),
        (["--config.train.steps=1.5"], "train.steps is 1.5; it must be a whole number."),
        (["--config.train.steps"], "--config.train.steps has no value; write --config.train.steps=VALUE."),
        (["--config.eval.mixing=1"], "eval.mixing is '1'; it must be true or false."),
        (["--config.eval.pass_k=1,x"], "eval.pass_k is ('1,x',); it must be a tuple, each a whole number."),
        (["--config.rollout.top_p=1.0"], "the setting rollout.top_p has been removed: training samples"),
        (["--confg=x"], "unknown setting --confg"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_flag_is_named(arguments, sentence):
    argv = ["train", f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=w", *arguments]
    with pytest.raises(ValueError) as refusal:
        flags.parse_flags(argv)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_missing_flags_are_asked_for():
    with pytest.raises(ValueError, match=r"--config=configs/NAME\.py is missing"):
        flags.parse_flags(["train", "--workdir=w"])
    with pytest.raises(ValueError, match=r"'nowhere\.py' does not exist"):
        flags.parse_flags(["train", "--workdir=w", "--config=nowhere.py"])
    with pytest.raises(ValueError, match=r"--workdir=gs://bucket/run is an address and no folder; mount"):
        flags.parse_flags(["train", "--workdir=gs://bucket/run"])
    with pytest.raises(ValueError, match="--workdir=DIR is missing"):
        flags.parse_flags(["train", f"--config={ROOT / 'configs' / 'tiny.py'}"])


def test_overrides_reach_the_settings():
    argv = ["train", f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=w"]
    argv += ["--config.mixing.rate=0.25", "--config.eval.problems=7", "--config.objective.scale_by_std=false"]
    config, options = flags.parse_flags(argv, step="best")
    settings = resolve(config)
    assert (settings.mixing.rate, settings.eval.problems, settings.objective.scale_by_std) == (0.25, 7, False)
    assert options == {"workdir": "w", "step": "best"}


def test_none_is_a_value_where_a_setting_is_optional():
    def parsed(*arguments):
        argv = ["train", f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=w", *arguments]
        return resolve(flags.parse_flags(argv)[0])

    settings = parsed(
        "--config.mixing.until=None",
        "--config.objective.dual_clip=None",
        "--config.eval.every=None",
        "--config.eval.problems=None",
        "--config.data.chat_template=None",
    )
    assert settings.mixing.until is settings.objective.dual_clip is settings.eval.every is None
    assert parsed("--config.mixing.until=</answer>").mixing.until == "</answer>"
    assert parsed("--config.eval.every=7").eval.every == 7
    for leaf in ("mixing.k", "model.path", "optimizer.learning_rate", "objective.loss_on_mixed"):
        with pytest.raises(ValueError, match=f"{leaf} is None; it needs a value"):
            parsed(f"--config.{leaf}=None")


@pytest.mark.parametrize("name", REMOVED)
def test_a_config_that_sets_a_removed_setting_is_refused_with_what_to_use(name, tmp_path):
    file = tmp_path / "old.py"
    lines = ["from configs import base", "def get_config():", "    config = base.get_config()"]
    file.write_text("\n".join([*lines, f"    config.{name} = {REMOVED[name][0]!r}", "    return config"]))
    with pytest.raises(UserError) as refusal:
        flags.load_config(str(file))
    assert f"the setting {name} has been removed: {REMOVED[name][1]}." in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", (3,)), ("(1, 8)", (1, 8)), ("1,8", (1, 8)), ("[8]", (8,))],
)
def test_a_tuple_is_read_from_one_number_or_several(text, value):
    argv = [
        "train",
        f"--config={ROOT / 'configs' / 'base.py'}",
        "--workdir=w",
        f"--config.eval.pass_k={text}",
    ]
    assert resolve(flags.parse_flags(argv)[0]).eval.pass_k == value


@pytest.mark.parametrize("name", ["rollout.temperature", "objective.dual_clip"])
def test_a_float_may_be_written_as_a_whole_number(name):
    argv = ["train", f"--config={ROOT / 'configs' / 'base.py'}", "--workdir=w", f"--config.{name}=2"]
    value = resolve(flags.parse_flags(argv)[0]).leaves()[name]
    assert (value, type(value)) == (2.0, float)


@pytest.mark.parametrize("name", ["mixing.rate", "checkpoint.grace_s"])
def test_a_whole_number_beyond_float64_is_no_number(name):
    kind = Settings.kinds()[name]
    with pytest.raises(UserError, match=f"{name} is 1000.*must be a finite number"):
        kind.check(name, 10**400)
