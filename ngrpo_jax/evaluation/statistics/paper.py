"""What the paper reports (arXiv 2606.10768, Tables 1 to 5 and the text), for comparison with our results.

Owns these numbers, in percent, as printed there, and the rule that finds the row of a run. The paper's Pass@k
is the bootstrap that this project calls best@k (docs/evaluation.md).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

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
SAMPLES, TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 32, 0.6, 0.95, 8192


class Cell(NamedTuple):
    """Mean@32, Pass@16 and Pass@32 in percent; None where the paper reports none."""

    mean: float | None
    pass_16: float | None
    pass_32: float | None


def _row(*triples: tuple[float, float, float]) -> dict[str, Cell]:
    return {name: Cell(*triple) for name, triple in zip((*SETS, "average"), triples, strict=True)}


def _average(pass_32: float) -> dict[str, Cell]:
    return {"average": Cell(None, None, pass_32)}


# backbone -> method -> data set (or "average") -> Cell
TABLE: Mapping[str, Mapping[str, Mapping[str, Cell]]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "base": _row(
            (20.83, 38.05, 41.19), (64.14, 91.73, 92.37), (74.88, 89.38, 90.29), (53.28, 73.05, 74.62)
        )
        | {"gpqa_diamond": Cell(32.23, 85.51, 90.79)},
        "Soft Thinking": _row(
            (20.73, 39.90, 44.56), (64.77, 94.03, 96.09), (75.12, 89.77, 90.90), (53.54, 74.56, 77.18)
        ),
        "GRPO": _row(
            (21.35, 43.61, 47.31), (63.91, 93.42, 94.60), (75.61, 89.43, 90.32), (53.62, 75.49, 77.41)
        )
        | {"gpqa_diamond": Cell(32.24, 86.25, 91.95)},
        "STHT": _row(
            (20.42, 42.66, 46.73), (62.03, 93.75, 96.88), (74.81, 89.43, 90.55), (52.42, 75.28, 78.05)
        ),
        "N-GRPO": _row(
            (23.33, 46.48, 50.28), (64.14, 94.07, 96.18), (74.87, 89.92, 91.05), (54.11, 76.82, 79.17)
        )
        | {"gpqa_diamond": Cell(33.68, 87.58, 92.87)},
        "GSPO": _average(77.34),
        "N-GSPO": _average(79.04),
        "N-GRPO, rate 0.15": _average(78.12),
        "N-GRPO, rate 0.2": _average(77.65),
        "N-GRPO without rate": _average(77.32),
        "Gumbel": _average(76.89),
        "N-GRPO, l2": _average(77.68),
        "N-GRPO, l1": _average(75.16),
        "mixing at inference": _average(77.05),
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        "base": _row(
            (33.23, 54.73, 57.38), (79.92, 93.50, 94.16), (84.24, 91.66, 92.14), (65.80, 79.96, 81.23)
        ),
        "GRPO": _row(
            (34.27, 56.13, 58.32), (81.88, 94.28, 94.87), (85.40, 92.21, 92.63), (67.18, 80.87, 81.94)
        ),
        "STHT": _row(
            (33.75, 55.76, 58.40), (80.23, 95.43, 96.49), (83.95, 92.08, 92.71), (65.98, 81.09, 82.53)
        ),
        "N-GRPO": _row(
            (34.27, 58.00, 61.18), (80.70, 96.92, 98.13), (84.94, 92.77, 93.28), (66.64, 82.56, 84.20)
        ),
    },
    "Llama-3.2-1B": {
        name: _average(value)
        for name, value in (("base", 41.61), ("GRPO", 44.77), ("STHT", 44.17), ("N-GRPO", 46.34))
    },
    "Qwen3-1.7B-Base": {
        name: _average(value)
        for name, value in (("base", 61.09), ("GRPO", 63.01), ("STHT", 61.94), ("N-GRPO", 63.46))
    },
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
        # Table 5 does not say which checkpoint it mixes at inference: its row matches every one.
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


def comparable(
    *, samples: int, temperature: float, top_p: float, top_k: int, max_new_tokens: int, reward: str
) -> bool:
    """Whether an evaluation has the sampling and grading of the paper's."""
    wanted = (SAMPLES, TEMPERATURE, TOP_P, 0, MAX_NEW_TOKENS)
    return (samples, temperature, top_p, top_k, max_new_tokens) == wanted and reward in ("math", "choice")
