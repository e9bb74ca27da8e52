"""What the paper reports (arXiv 2606.10768, Tables 1 to 5 and the text), for comparison with our results.

Owns these numbers (paper.toml) and the rule that finds the row of a run. The paper's Pass@k
is the bootstrap that this project calls best@k (docs/evaluation.md).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ngrpo_jax.files import toml_beside

SETS = ("aime25", "amc23", "math500")  # the average in Table 1 is over these
TITLES = {
    "aime24": "AIME24",
    "aime25": "AIME25",
    "amc23": "AMC23",
    "math500": "MATH500",
    "gpqa_diamond": "GPQA-Diamond",
    "gsm8k": "GSM8K",
}
# The settings of every evaluation of the paper.
SAMPLING = {
    "eval.samples": 32,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
    "eval.top_k": 0,
    "eval.max_new_tokens": 8192,
}


class Cell(NamedTuple):
    """Mean@32, Pass@16 and Pass@32 in percent; None where the paper reports none."""

    mean: float | None
    pass_16: float | None
    pass_32: float | None


def _cell(value: float | list[float]) -> Cell:
    return Cell(*value) if isinstance(value, list) else Cell(None, None, value)


# backbone -> method -> data set (or "average") -> Cell
TABLE: Mapping[str, Mapping[str, Mapping[str, Cell]]] = {
    backbone: {
        method: {name: _cell(value) for name, value in cells.items()} for method, cells in methods.items()
    }
    for backbone, methods in toml_beside(__file__).items()
}


def backbone(model: str) -> str | None:
    """The paper's backbone whose name a model's path contains, or None."""
    return next((name for name in TABLE if name.lower() in model.lower()), None)


# The mixing settings that all neighbour mixtures of the paper share; rate and metric vary.
NEIGHBOR: Mapping[str, Any] = {
    "k": 3,
    "table": "embedding",
    "weights": "logits",
    "token": "anchor",
    "keep_out": None,
    "distinct_spelling": False,
}


def method(
    *, trained: bool, strategy: str, rate: float, metric: str, algorithm: str, mixes: bool, **neighbor: Any
) -> str | None:
    """The paper's name of the method by which a checkpoint was trained and evaluated, or None.

    Args:
      trained: False for the starting model.
      strategy, rate, metric, algorithm: settings of the training.
      mixes: whether the evaluation mixed.
      neighbor: settings of `NEIGHBOR`; neighbour mixtures with other values have no name in the paper.
    """
    departs = any(neighbor[name] != NEIGHBOR[name] for name in neighbor)
    if departs and strategy == "neighbor" and (mixes or (trained and rate > 0)):
        return None
    if mixes:
        # Which checkpoint Table 5 mixes at inference is not given: its row matches every one.
        soft = "Soft Thinking" if not trained else None
        return {"neighbor": "mixing at inference", "soft": soft}.get(strategy)
    if not trained:
        return "base"
    if strategy == "none" or rate == 0:
        return {"grpo": "GRPO", "gspo": "GSPO"}.get(algorithm)
    if algorithm == "gspo":
        return "N-GSPO" if (strategy, rate, metric) == ("neighbor", 0.1, "cosine") else None
    if strategy != "neighbor":
        return {"noise": "STHT", "gumbel": "Gumbel"}.get(strategy)
    if metric != "cosine":
        return f"N-GRPO, {metric}" if rate == 0.1 else None
    return {0.1: "N-GRPO", 1.0: "N-GRPO without rate"}.get(rate, f"N-GRPO, rate {rate:g}")


def comparable(depends: Mapping[str, Any]) -> bool:
    """Whether an evaluation with these settings has the sampling and grading of the paper's."""
    sampled_alike = all(depends[name] == value for name, value in SAMPLING.items())
    return sampled_alike and depends["reward.kind"] in ("math", "choice")
