"""Settings: every config resolves, every leaf is read, and what cannot be right is refused by name."""

import ast
import pathlib

import pytest

from configs import base
from ngrpo_jax import flags
from ngrpo_jax.settings import resolve

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


def test_every_leaf_is_read_somewhere():
    read = set()
    for path in (ROOT / "ngrpo_jax").rglob("*.py"):
        if path.name == "settings.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            # The checks of __post_init__ do not count as a use; properties and methods do.
            bodies = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.name != "__post_init__"
            ]
        else:
            bodies = [ast.parse(path.read_text(encoding="utf-8"))]
        for body in bodies:
            read |= {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
    for leaf in flags.leaves(base.get_config()):
        assert leaf.rpartition(".")[2] in read, f"nothing reads the setting {leaf}"


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
        ("mixing.rate", 1.5, "mixing rate 1.5"),
        ("mixing.k", 0, "mixing k 0"),
        ("mixing.metric", "angle", "metric 'angle'"),
        ("mixing.strategy", "blend", "strategy 'blend'"),
        ("mixing.table", "output", "mixing table 'output' is unknown: use one of embedding, head"),
        ("mixing.weights", "softmax", "mixing weights 'softmax' is unknown: use one of logits, probs"),
        ("mixing.token", "argmax", "mixing token 'argmax' is unknown: use one of anchor, sampled"),
        ("mixing.sigma", -1.0, "mixing sigma -1.0"),
        ("mixing.keep_out", "", "mixing.keep_out is empty"),
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
            "objective.old_logprobs is 'actor'; it must be one of trainer, sampler",
        ),
        ("objective.importance_cap", 0.0, "objective.importance_cap is 0.0; it must be above 0, or None"),
        ("objective.entropy_coef", -0.1, "objective.entropy_coef is -0.1"),
        ("rollout.group", 1, "rollout.group is 1"),
        ("rollout.top_p", 0.9, "rollout.top_p is 0.9"),
        ("rollout.top_k", 5, "rollout.top_k is 5"),
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
        ("reward.memory_mb", 64, "reward.memory_mb is 64; a grader's process needs at least 128"),
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
            "mixing.table is 'head', which mixing.strategy 'soft'",
        ),
        ({"mixing.strategy": "noise", "mixing.token": "sampled"}, "mixing.token is 'sampled', which"),
        (
            {"mixing.strategy": "gumbel", "mixing.distinct_spelling": True},
            "mixing.distinct_spelling is True, which",
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
        (["--config.mixing.rate=often"], "often"),
        (["--config.train.steps=1.5"], "1.5"),
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
