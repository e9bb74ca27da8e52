"""What was mixed with what, over all mixtures of samples.jsonl, beside the paper's Appendix E."""

import itertools
from statistics import fmean
from typing import Any

from ngrpo_jax.report.numbers import number, percent
from ngrpo_jax.report.samples import EDGES, Mixtures
from ngrpo_jax.report.workdir import Run

MOST_TOKENS = 300  # rows of the table of anchors
PARTNERS = 4  # of an anchor
# arXiv 2606.10768, Appendix E: mean, minimum and share below 0.95 of the cosines.
PAPER = ("0.9985", "0.8813", "1.2 %")


def summary(mixtures: Mixtures, run: Run) -> dict[str, Any] | None:
    """The tables of the mixing section; None where the file has no mixture.

    The paper is compared with the metrics of all steps: the kept responses are chosen, not drawn.
    """
    if not mixtures.count:
        return None
    below = mixtures.cosines[: EDGES.index(0.95)].sum() / mixtures.count
    kept = (f"{mixtures.total / mixtures.count:.4f}", f"{mixtures.least:.4f}", percent(below))
    rows = [("kept responses", kept), ("paper, Appendix E", PAPER)]
    means, least, shares = (
        run.values(f"rollout/mix_cosine_{name}")[1] for name in ("mean", "min", "below_095")
    )
    if means and least and shares:
        of_run = (f"{fmean(means):.4f}", f"{min(least):.4f}", percent(fmean(shares)))
        rows.insert(0, ("this run, all steps", of_run))
    return {
        "count": number(mixtures.count),
        "weight": percent(mixtures.weight / mixtures.count),
        "appendix": (("mean cosine", "least", "below 0.95"), rows),
        "histogram": _histogram(mixtures),
        "tokens": _tokens(mixtures),
    }


def _histogram(mixtures: Mixtures) -> list[tuple[str, str, float]]:
    """(range, share in words, share) of the cosines, from the first range that has any."""
    shares = mixtures.cosines / mixtures.count
    bounds = [f"{max(low, -1):g} to {min(high, 1):g}" for low, high in itertools.pairwise(EDGES)]
    rows = [(bound, percent(share), float(share)) for bound, share in zip(bounds, shares, strict=True)]
    return rows[int(shares.nonzero()[0][0]) :]


def _tokens(mixtures: Mixtures) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """(anchor, times, its mean weight, its partners with their mean weights), the most frequent first."""
    ordered = sorted(mixtures.anchors.items(), key=lambda item: -item[1][0])[:MOST_TOKENS]
    return [
        (
            visible(anchor),
            number(int(times)),
            percent(weight / times),
            [
                (visible(text), _small(total / times))
                for text, total in mixtures.partners[anchor].most_common(PARTNERS)
            ],
        )
        for anchor, (times, weight) in ordered
    ]


def _small(share: float) -> str:
    """A share that is above 0 and may be far below."""
    return percent(share) if share >= 5e-4 else "under 0.1 %"


def visible(text: str) -> str:
    """Text with a sign for each space, line break and tab, and an escape for other invisible characters."""
    signs = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in signs
    )
