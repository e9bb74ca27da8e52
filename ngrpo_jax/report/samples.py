"""Responses as HTML with their mixed tokens marked. Owns which responses are shown, and the marking."""

from collections.abc import Sequence
from html import escape
from typing import Any

_MOST = 24  # responses on a page; samples.jsonl has all
_OPEN = 1  # of these are unfolded


def samples_section(samples: Sequence[dict[str, Any]], heading: str) -> str:
    """One folded block for each shown response; those are spread evenly over the run."""
    shown = spread(samples, _MOST)
    count = (
        f"{len(shown)} of {len(samples)}, spread over the run"
        if len(shown) < len(samples)
        else f"All {len(shown)}"
    )
    blocks = "".join(_sample(sample, unfolded=index < _OPEN) for index, sample in enumerate(shown))
    return (
        f'{heading}<p class="soft">{count}. A <mark>marked</mark> token went back into the model as a '
        f"mixture of itself and its neighbours.</p>{blocks}"
    )


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def highlight(text: str, spans: Sequence[Sequence[int]]) -> str:
    """`text` escaped, with `[start, end)` character spans marked; a span that exceeds the text is cut."""
    pieces, at = [], 0
    for start, end in sorted((max(0, int(s)), min(len(text), int(e))) for s, e in spans):
        start = max(start, at)
        if start < end:
            pieces += [escape(text[at:start]), f"<mark>{escape(text[start:end])}</mark>"]
            at = end
    return "".join([*pieces, escape(text[at:])])


def _sample(sample: dict[str, Any], *, unfolded: bool) -> str:
    reward = sample.get("reward")
    tone = "" if not isinstance(reward, int | float) else "good" if reward > 0 else "bad"
    badge = "" if reward is None else f'<span class="badge {tone}">reward {escape(f"{reward:g}")}</span>'
    step = "" if sample.get("step") is None else f"step {escape(str(sample['step']))} · "
    problem = str(sample.get("problem", ""))
    title = problem if len(problem) <= 90 else problem[:87] + "…"
    spans = sample.get("mixed") or []
    facts = [("problem", problem)] if title != problem else []
    facts += [("expected", str(sample["answer"]))] if sample.get("answer") is not None else []
    if sample.get("tokens") is not None:
        cut = "" if sample.get("stopped", True) else ", cut off at the limit"
        facts += [("length", f"{sample['tokens']} tokens{cut}")]
    facts += [("mixed", f"{len(spans)} places")] if spans else [("mixed", "nowhere")]
    items = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    response = f'<div class="response">{highlight(sample["response"], spans)}</div>'
    return (
        f"<details{' open' if unfolded else ''}><summary>{badge}{step}{escape(title)}</summary>"
        f'<div><dl class="facts">{items}</dl>{response}</div></details>'
    )
