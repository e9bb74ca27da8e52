"""What became of settings of earlier versions: for resumed runs, and for configs and flags that name one."""

from typing import Any

RENAMED: dict[str, str] = {}  # old name -> name of today
RENAMED_VALUES: dict[tuple[str, Any], Any] = {("objective.old_logprobs", "trainer"): "learner"}
# Removed setting -> its last default, and what to use in its place.
REMOVED: dict[str, tuple[Any, str]] = {
    "rollout.top_p": (1.0, "training samples from the whole distribution; leave it out"),
    "rollout.top_k": (0, "training samples from the whole distribution; leave it out"),
}


def former(name: str) -> str | None:
    """The sentence about a setting that earlier versions had; None where there was no such setting."""
    if name in RENAMED:
        return f"the setting {name} is called {RENAMED[name]} now."
    return f"the setting {name} has been removed: {REMOVED[name][1]}." if name in REMOVED else None


def former_in(text: str) -> str | None:
    """The same about the first such setting that the text of a config names."""
    return next((former(name) for name in (*RENAMED, *REMOVED) if f".{name}" in text), None)
