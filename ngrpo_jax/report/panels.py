"""Which metrics are drawn together, under which heading, and how each is to be read.

Owns the table of panels and the rule for metrics that are not in it. Draws nothing.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Panel(NamedTuple):
    """One chart. `series` maps a metric's name to its label; `kind` is "lines", "log" or "stack"."""

    title: str
    series: dict[str, str]
    unit: str = ""  # "", "%", "s" or the name of a unit
    kind: str = "lines"
    note: str = ""


class Section(NamedTuple):
    """Panels under one heading, with a sentence on what they tell."""

    title: str
    note: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Learning",
        "Does the model get better? Reward is that of the training rollouts; held-out problems are "
        "never trained on.",
        (
            Panel("Mean reward", {"reward/mean": "training rollouts"}),
            Panel(
                "Held-out accuracy",
                {"eval/mean_at_n": "Mean@n", "eval/pass_at_k": "Pass@k", "eval/maj_at_n": "Maj@n"},
                "%",
            ),
            Panel(
                "Groups without variance",
                {"groups/zero_variance": "rewards all alike"},
                "%",
                note="As graded. Its advantage is 0, unless a penalty for length tells it apart.",
            ),
        ),
    ),
    Section(
        "Responses",
        "What is written, and how freely.",
        (
            Panel(
                "Response length",
                {"rollout/length_mean": "training", "eval/length_mean": "held out"},
                "tokens",
            ),
            Panel("Longest response", {"rollout/length_max": "training"}, "tokens"),
            Panel(
                "Cut off at the length limit",
                {"rollout/truncated": "training", "eval/truncated": "held out"},
                "%",
            ),
            Panel("Entropy of the policy", {"learner/entropy": "mean a token"}, "nats"),
            Panel(
                "Responses without a verdict",
                {"reward/no_verdict": "past the deadline, or beyond the grader"},
                "%",
                note="Their reward is 0.",
            ),
            Panel("Reward taken off for length", {"reward/overlong_penalty": "mean a response"}),
        ),
    ),
    Section(
        "Mixing",
        "How often the next input was a mixture of neighbours, and how far it lay from the anchor.",
        (
            Panel("Mixed tokens", {"rollout/mixed_fraction": "share of response tokens"}, "%"),
            Panel("Cosine of mixed input to anchor", {"rollout/mix_cosine_mean": "mean"}),
            Panel("Smallest such cosine", {"rollout/mix_cosine_min": "of a step"}),
            Panel("Mixed inputs below cosine 0.95", {"rollout/mix_cosine_below_095": "share"}, "%"),
            Panel("Weight of the anchor", {"rollout/mix_anchor_weight": "mean over mixed inputs"}),
        ),
    ),
    Section(
        "Update",
        "How far a step moves the policy.",
        (
            Panel(
                "KL to the reference",
                {"learner/kl": "mean a token"},
                "nats",
                note="By the estimator of objective.kl_estimator.",
            ),
            Panel("Gradient norm", {"learner/grad_norm": "before clipping"}),
            Panel("Norm of the parameter update", {"learner/update_norm": "mean of the optimiser steps"}),
            Panel(
                "Clipped tokens",
                {
                    "learner/clip_low": "ratio fell",
                    "learner/clip_high": "ratio rose",
                    "learner/dual_clip": "dual clip",
                },
                "%",
            ),
            Panel(
                "Probability ratio to the old policy",
                {"learner/ratio": "mean", "learner/ratio_max": "largest", "learner/ratio_min": "least"},
            ),
            Panel("Loss", {"learner/loss": "with KL", "learner/policy_loss": "without"}),
            Panel("Importance weights, trainer to sampler", {"learner/importance": "mean a token"}),
            Panel("Importance weights at their cap", {"learner/importance_capped": "share of tokens"}, "%"),
            Panel("Groups left out of the update", {"groups/left_out": "rewards all alike"}),
            Panel("Responses left out of the update", {"responses/left_out": "of such a group, or cut off"}),
        ),
    ),
    Section(
        "Sampler against trainer",
        "Both should give a token the same probability; what is left here is rounding, or a fault.",
        (
            Panel("|log π sampler − log π trainer|", {"gap/mean": "mean", "gap/max": "largest"}, kind="log"),
            Panel("KL of sampler and trainer", {"gap/kl": "mean a token"}),
        ),
    ),
    Section(
        "Speed",
        "Where the time goes.",
        (
            Panel(
                "Time a step, by phase",
                {
                    "time/table": "neighbour table",
                    "time/rollout": "rollout",
                    "time/reward": "rewards",
                    "time/logprobs": "log-probabilities",
                    "time/update": "update",
                },
                "s",
                "stack",
            ),
            Panel(
                "Response tokens a second",
                {"speed/rollout_tokens": "rollout alone", "speed/step_tokens": "whole step"},
                "tokens/s",
            ),
            Panel(
                "Learner's tokens a second",
                {"speed/update_tokens": "update", "speed/logprob_tokens": "log-probabilities"},
                "tokens/s",
            ),
            Panel("Arithmetic of the update", {"speed/update_mfu": "share of the devices' peak"}, "%"),
            Panel("Peak memory", {"memory/peak": "fullest device"}, "bytes"),
            Panel("Verdicts a second", {"speed/verdicts": "grading"}, "verdicts/s"),
            Panel("Packed rows filled", {"rows/fill": "tokens that are not padding"}, "%"),
            Panel("Refresh of the neighbour table", {"table/cost": "share of a build's cost"}, "%"),
            Panel(
                "Work of such a refresh",
                {"table/rescored": "rows scored again", "table/searched": "rows searched again"},
                "%",
            ),
        ),
    ),
)
REST_TITLE = "Everything else"
# Metrics that follow from what the named panel shows, or add little to it: no chart of their own.
_COVERED = {
    "time/step": "Time a step, by phase",
    "reward/std": "Mean reward",
    "speed/reward_tokens": "Verdicts a second",
}


def present(keys: Iterable[str]) -> list[Section]:
    """The sections for metrics that exist, without empty panels; unknown metrics follow, one chart each."""
    have = list(keys)
    sections, used, titles = [], set(), set()
    for section in SECTIONS:
        panels = []
        for panel in section.panels:
            series = {key: label for key, label in panel.series.items() if key in have}
            if series:
                panels.append(panel._replace(series=series))
                used |= set(series)
                titles.add(panel.title)
        if panels:
            sections.append(section._replace(panels=tuple(panels)))
    rest = [key for key in have if key not in used and _COVERED.get(key) not in titles]
    if rest:
        sections.append(
            Section(REST_TITLE, "Metrics by their own names.", tuple(map(_own_panel, sorted(rest))))
        )
    return sections


def _own_panel(key: str) -> Panel:
    return Panel(key, {key: key.partition("/")[2] or key}, "s" if key.startswith("time/") else "")
