"""Which metrics share a chart, under which heading, with which labels.

Owns the table of panels, and the rule for metrics that are not in it. Draws nothing.
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
    """Panels under one heading, with a sentence on what they show."""

    title: str
    note: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Learning",
        "Whether the model gets better. Rewards are those of the training rollouts; held-out problems "
        "are never trained on.",
        (
            Panel("Mean reward", {"reward/mean": "training rollouts"}),
            Panel(
                "Held-out accuracy",
                {"eval/mean_at_n": "Mean@n", "eval/pass_at_k": "Pass@k", "eval/maj_at_n": "Maj@n"},
                "%",
            ),
            Panel(
                "Groups without variance",
                {"groups/zero_variance": "rewards all equal"},
                "%",
                note="By the grader's rewards. Advantages are 0 there, unless a penalty for length differs.",
            ),
        ),
    ),
    Section(
        "Responses",
        "How long responses are, how they end, and how uncertain the policy is.",
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
                {"reward/no_verdict": "past the deadline, or the grader failed"},
                "%",
                note="Their reward is 0.",
            ),
            Panel("Reward taken off for length", {"reward/overlong_penalty": "mean a response"}),
        ),
    ),
    Section(
        "Mixing",
        "How often the next input was a mixture of neighbours, and how close it was to its anchor.",
        (
            Panel("Mixed tokens", {"rollout/mixed_fraction": "share of response tokens"}, "%"),
            Panel("Cosine of mixed input to anchor", {"rollout/mix_cosine_mean": "mean"}),
            Panel("Smallest cosine of mixed input to anchor", {"rollout/mix_cosine_min": "of a step"}),
            Panel("Mixed inputs below cosine 0.95", {"rollout/mix_cosine_below_095": "share"}, "%"),
            Panel("Weight of the anchor", {"rollout/mix_anchor_weight": "mean over mixed inputs"}),
        ),
    ),
    Section(
        "Update",
        "How far a step moves the policy from the old policy and the reference.",
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
                    "learner/clip_low": "ratio below its range",
                    "learner/clip_high": "ratio above its range",
                    "learner/dual_clip": "dual clip",
                },
                "%",
            ),
            Panel(
                "Probability ratio to the old policy",
                {"learner/ratio": "mean", "learner/ratio_max": "largest", "learner/ratio_min": "least"},
            ),
            Panel("Loss", {"learner/loss": "with KL", "learner/policy_loss": "without"}),
            Panel("Importance weights, learner to sampler", {"learner/importance": "mean a token"}),
            Panel("Importance weights at their cap", {"learner/importance_capped": "share of tokens"}, "%"),
            Panel("Groups left out of the update", {"groups/left_out": "rewards all equal"}),
            Panel(
                "Responses left out of the update", {"responses/left_out": "of a group left out, or cut off"}
            ),
        ),
    ),
    Section(
        "Sampler against learner",
        "Both should give a token the same probability: a difference beyond rounding is a fault.",
        (
            Panel("|log π sampler − log π learner|", {"gap/mean": "mean", "gap/max": "largest"}, kind="log"),
            Panel("KL of sampler and learner", {"gap/kl": "mean a token"}),
        ),
    ),
    Section(
        "Speed",
        "Seconds of a step by phase, and tokens a second.",
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
            Panel(
                "Model FLOP utilisation of the update",
                {"speed/update_mfu": "share of the devices' peak"},
                "%",
            ),
            Panel("Peak memory", {"memory/peak": "fullest device"}, "bytes"),
            Panel("Verdicts a second", {"speed/verdicts": "grading"}, "verdicts/s"),
            Panel("Packed rows filled", {"rows/fill": "tokens that are not padding"}, "%"),
            Panel("Refresh of the neighbour table", {"table/cost": "share of a build's cost"}, "%"),
            Panel(
                "Work of a refresh of the neighbour table",
                {"table/rescored": "rows scored again", "table/searched": "rows searched again"},
                "%",
            ),
        ),
    ),
)
REST_TITLE = "Everything else"
# Metrics without a chart: "Time a step, by phase", "Mean reward" and "Verdicts a second" show as much.
_NO_CHART = {"time/step", "reward/std", "speed/reward_tokens"}


def present(keys: Iterable[str]) -> list[Section]:
    """The sections of the metrics `keys`, without empty panels; a metric of no panel gets one at the end."""
    have = set(keys)
    sections = [section._replace(panels=_with_metrics(section.panels, have)) for section in SECTIONS]
    known = {key for section in sections for panel in section.panels for key in panel.series}
    own = tuple(_own_panel(key) for key in sorted(have - known - _NO_CHART))
    sections.append(Section(REST_TITLE, "Metrics by their own names.", own))
    return [section for section in sections if section.panels]


def _with_metrics(panels: Iterable[Panel], have: set[str]) -> tuple[Panel, ...]:
    """The panels with the series of these metrics alone, less those that have none."""
    kept = (
        panel._replace(series={key: label for key, label in panel.series.items() if key in have})
        for panel in panels
    )
    return tuple(panel for panel in kept if panel.series)


def _own_panel(key: str) -> Panel:
    return Panel(key, {key: key.partition("/")[2] or key}, "s" if key.startswith("time/") else "")
