"""The arms of the study: what each changes of a task's settings, and whether it trains at all.

Must not know how runs are made or compared.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.study.tasks import Task

Changes = dict[str, Any]
GRPO: Changes = {"mixing.rate": 0.0}
GSPO: Changes = {"objective.algorithm": "gspo", "objective.clip_low": 3e-4, "objective.clip_high": 4e-4}
NEVER = 10**6  # rollouts between two refreshes of the table


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
      title: a line for tables.
      changes: by dotted names, what it changes of the task's settings; those of N-GRPO are rate 0.1 and k 3.
      trains: false where the base model is evaluated as it is.
    """

    title: str
    changes: Callable[[Task], Changes]
    trains: bool = True


def _fixed(title: str, *, trains: bool = True, **sections: Changes) -> Arm:
    """An arm with the same changes on every task, given as SECTION={NAME: VALUE}."""
    changes = {f"{section}.{name}": x for section, values in sections.items() for name, x in values.items()}
    return Arm(title, lambda task: changes, trains)


def _mixed(title: str, **mixing: Any) -> Arm:
    return _fixed(title, mixing=mixing)


def _untrained(title: str, **mixing: Any) -> Arm:
    """The base model, whose evaluation mixes as these settings say."""
    return _fixed(title, trains=False, mixing=mixing, eval={"mixing": True})


ARMS: dict[str, Arm] = {
    "grpo": Arm("GRPO", lambda task: GRPO),
    "ngrpo": _mixed("N-GRPO, ρ 0.1, k 3"),
    "k1": _mixed("anchor written, its own row fed (k 1)", k=1),
    "random": _mixed("random rows, true weights", strategy="random"),
    "matched": _mixed("random rows, cosine as of N-GRPO", strategy="matched"),
    "temperature": Arm(
        "GRPO at the matched temperature",
        lambda task: {**GRPO, "rollout.temperature": task.matched_temperature},
    ),
    "rate005": _mixed("N-GRPO, ρ 0.05", rate=0.05),
    "rate020": _mixed("N-GRPO, ρ 0.2", rate=0.2),
    "k2": _mixed("N-GRPO, k 2", k=2),
    "k5": _mixed("N-GRPO, k 5", k=5),
    "l2": _mixed("N-GRPO, neighbours by L2", metric="l2"),
    "norate": _mixed("N-GRPO without rate (ρ 1)", rate=1.0),
    "stht": _mixed("STHT: Gaussian noise, σ 0.33, every step", strategy="noise", rate=1.0),
    "gumbel": _mixed("Gumbel soft thinking, k 10, every step", strategy="gumbel", rate=1.0, k=10),
    "release_weights": _mixed("weights as the release computes them", weights="probs"),
    "sampled_token": _mixed("sampled token written", token="sampled"),
    "no_loss_on_mixed": _fixed("no loss on mixed steps", objective={"loss_on_mixed": False}),
    "reasoning_words_out": Arm(
        "numbers and signs kept out of mixing", lambda task: {"mixing.keep_out": task.reasoning_words}
    ),
    "distinct_spelling": _mixed("spelling variants out", distinct_spelling=True),
    "never_refreshed": _mixed("table never refreshed", refresh_every=NEVER),
    "gspo": Arm("GSPO", lambda task: {**GRPO, **GSPO}),
    "ngspo": Arm("N-GSPO", lambda task: GSPO),
    "grpo_lora": _fixed("GRPO, LoRA of rank 16", mixing={"rate": 0.0}, lora={"rank": 16}),
    "ngrpo_lora": _fixed("N-GRPO, LoRA of rank 16", lora={"rank": 16}),
    "base": _fixed("base model", trains=False, mixing={"rate": 0.0}),
    "base_ngrpo": _untrained("base model, mixed as by N-GRPO"),
    "base_k1": _untrained("base model, anchor written (k 1)", k=1),
    "base_random": _untrained("base model, random rows", strategy="random"),
    "soft": _untrained("Soft Thinking: base model, k 10, every step", strategy="soft", rate=1.0, k=10),
}
CORE = ("grpo", "ngrpo", "k1", "random")
