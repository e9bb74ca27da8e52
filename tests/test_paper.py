"""The paper's experiments: what is compared differs in nothing else, and the document's table is true."""

import ast
import re

import pytest

from docs import paper_table
from ngrpo_jax import flags
from ngrpo_jax.evaluation.statistics import paper
from ngrpo_jax.settings import resolve

SHARED = {"mesh.fsdp": 8}
GSPO = {"objective.algorithm": "gspo", "objective.clip_low": 3e-4, "objective.clip_high": 4e-4}
PLAIN = {"mixing.rate": 0.0}
STHT = {"mixing.strategy": "noise", "mixing.rate": 1.0}
MODELS = {
    "1_5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "llama_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen3_1_7b": "Qwen/Qwen3-1.7B-Base",
}
# name: what it sets apart from N-GRPO on the same backbone
COMPARED = {
    **{f"grpo_{backbone}": PLAIN for backbone in MODELS},
    **{f"stht_{backbone}": STHT for backbone in MODELS},
    "gspo_1_5b": PLAIN | GSPO,
    "ngspo_1_5b": GSPO,
    "gumbel_1_5b": {"mixing.strategy": "gumbel", "mixing.rate": 1.0, "mixing.k": 10},
    "ngrpo_1_5b_rate_100": {"mixing.rate": 1.0},
    "ngrpo_1_5b_rate_015": {"mixing.rate": 0.15},
    "ngrpo_1_5b_rate_020": {"mixing.rate": 0.2},
    "ngrpo_1_5b_l1": {"mixing.metric": "l1"},
    "ngrpo_1_5b_l2": {"mixing.metric": "l2"},
    "ngrpo_1_5b_mixed_eval": {"eval.mixing": True},
    "soft_thinking_1_5b": {
        "mixing.strategy": "soft",
        "mixing.rate": 1.0,
        "mixing.k": 10,
        "eval.mixing": True,
    },
}
RELEASED = {
    "mixing.table": "head",
    "mixing.weights": "probs",
    "mixing.token": "sampled",
    "rollout.temperature": 1.0,
    "objective.aggregate": "token",
    "checkpoint.every": 10,
    "eval.every": 1,
}


def _values(name):
    return paper_table.values(paper_table.CONFIGS / f"{name}.py")


def _apart(name, other):
    there = _values(other)
    return {leaf: value for leaf, value in _values(name).items() if value != there[leaf]}


@pytest.mark.parametrize("name", COMPARED)
def test_within_a_comparison_nothing_but_the_thing_compared_differs(name):
    backbone = next(b for b in sorted(MODELS, key=len, reverse=True) if f"_{b}" in name)
    assert _apart(name, f"ngrpo_{backbone}") == COMPARED[name]


@pytest.mark.parametrize("backbone", MODELS)
def test_backbones_differ_in_the_model_alone_and_the_rest_is_base(backbone):
    apart = paper_table.differences(paper_table.CONFIGS / f"ngrpo_{backbone}.py")
    model = {} if backbone == "1_5b" else {"model.path": MODELS[backbone]}
    assert apart == SHARED | model
    assert _values(f"ngrpo_{backbone}")["model.path"] == MODELS[backbone]


def test_no_config_of_the_paper_is_left_unchecked():
    names = {paper_table.name_of(path) for path in paper_table.paper_configs()}
    released = {f"released/{method}_{size}" for method in ("grpo", "ngrpo") for size in ("1_5b", "7b")}
    assert names == set(COMPARED) | {f"ngrpo_{backbone}" for backbone in MODELS} | released


def test_released_settings_are_those_of_the_released_files():
    small = {"mixing.k": 2, "objective.kl_coef": 0.01, "optimizer.learning_rate": 5e-7}
    assert _apart("released/ngrpo_1_5b", "ngrpo_1_5b") == RELEASED | small
    assert _apart("released/ngrpo_7b", "ngrpo_7b") == RELEASED | {"mixing.rate": 0.15}
    assert _apart("released/grpo_7b", "released/ngrpo_7b") == PLAIN
    back = {"objective.kl_coef": 0.001, "optimizer.learning_rate": 1e-6}
    assert _apart("released/grpo_1_5b", "released/ngrpo_1_5b") == PLAIN | back


def test_the_documents_table_is_what_the_configs_set():
    document = paper_table.DOCUMENT.read_text(encoding="utf-8")
    assert paper_table.rewritten(document) == document, "run python -m docs.paper_table"


def _lines_about(name):
    """The document's lines, but for its generated table, that name this config and not one like it."""
    document = paper_table.DOCUMENT.read_text(encoding="utf-8")
    prose = document.partition(paper_table.BEGIN)[0] + document.partition(paper_table.END)[2]
    whole = re.compile(rf"(?<![\w/]){re.escape(name)}(?!\w)")
    return [line for line in prose.split("\n") if whole.search(line)]


def test_the_document_names_every_config():
    for path in paper_table.paper_configs():
        assert _lines_about(paper_table.name_of(path)), path


@pytest.mark.parametrize("name", [*COMPARED, *(f"ngrpo_{backbone}" for backbone in MODELS)])
def test_the_expected_figure_is_the_papers_in_the_document_and_in_the_config(name):
    file = paper_table.CONFIGS / f"{name}.py"
    settings = resolve(flags.load_config(str(file)))
    trained = {
        leaf: getattr(settings.mixing, leaf) for leaf in ("strategy", "rate", "metric", *paper.NEIGHBOR)
    }
    method = paper.method(
        trained=settings.mixing.strategy != "soft",
        mixes=settings.eval.mixing,
        algorithm=settings.objective.algorithm,
        **trained,
    )
    expected = paper.TABLE[paper.backbone(settings.model.path)][method]["average"].pass_32
    assert any(line.startswith("|") and f"{expected:.2f}" in line for line in _lines_about(name))
    assert f"{expected:.2f} %" in ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_a_table_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="has lost the marks"):
        paper_table.rewritten("no marks")
