"""Responses for the page, with their mixed tokens marked. Owns which responses are shown, and the marking."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

MOST = 24  # responses on a page; samples.jsonl has all
_TITLE = 90  # characters


def spread(items: Sequence[Any], most: int = MOST) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def highlight(text: str, spans: Sequence[Sequence[int]]) -> Markup:
    """`text` escaped, with `[start, end)` character spans marked; a span that exceeds the text is cut."""
    pieces, at = [], 0
    for start, end in sorted((max(0, int(s)), min(len(text), int(e))) for s, e in spans):
        start = max(start, at)
        if start < end:
            pieces += [escape(text[at:start]), Markup("<mark>{}</mark>").format(text[start:end])]
            at = end
    return Markup("").join([*pieces, escape(text[at:])])


def shown(sample: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a row of samples.jsonl."""
    reward, spans, problem = sample.get("reward"), sample.get("mixed") or [], str(sample.get("problem", ""))
    title = problem if len(problem) <= _TITLE else problem[: _TITLE - 3] + "…"
    facts = [("problem", problem)] if title != problem else []
    facts += [("expected", sample["answer"])] if sample.get("answer") is not None else []
    if sample.get("tokens") is not None:
        cut = "" if sample.get("stopped", True) else ", cut off at the limit"
        facts += [("length", f"{sample['tokens']} tokens{cut}")]
    return {
        "badge": "" if reward is None else f"reward {reward:g}",
        "tone": "" if reward is None else "good" if reward > 0 else "bad",
        "title": title if sample.get("step") is None else f"step {sample['step']} · {title}",
        "facts": [*facts, ("mixed", f"{len(spans)} places" if spans else "nowhere")],
        "response": highlight(sample["response"], spans),
    }
