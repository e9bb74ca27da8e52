"""What an evaluation prints: each data set's metrics with their intervals, and the paper's beside ours.

Owns wording and layout. Takes generations as read from disk, so that a stored evaluation prints what it
printed when it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ngrpo_jax.evaluation.answers import answer_name
from ngrpo_jax.evaluation.generations import Generations
from ngrpo_jax.evaluation.statistics import estimates, paper
from ngrpo_jax.evaluation.statistics.estimates import Estimate
from ngrpo_jax.runtime import console

Metrics = Mapping[str, Estimate]


def details(generations: Generations, metrics: Metrics, pass_k: Sequence[int]) -> str:
    """One data set's table: estimate, value, 95 % interval."""
    depends = generations.header["depends"]
    samples = depends["eval.samples"]
    rows = [_with_interval(f"Mean@{samples}", metrics["mean_at_n"])]
    for k in pass_k:
        rows.append(_with_interval(f"Pass@{k}", metrics[f"pass_at_{k}"]))
        rows.append(_with_interval(f"best@{k} (bootstrap, as the paper's tables)", metrics[f"best_at_{k}"]))
    if "maj_at_n" in metrics:
        rows.append(_with_interval(f"Maj@{samples}", metrics["maj_at_n"]))
    rows.append(_with_interval("truncated responses", metrics["truncated"]))
    rows.append(_with_interval(f"responses with {answer_name(depends['reward.kind'])}", metrics["no_answer"]))
    rows.append(_with_interval("tokens a response", metrics["length_mean"]))
    rows.append(_with_interval("tokens of the longest", metrics["length_max"]))
    for name, value in (generations.cosines() or {}).items():
        rows.append(_with_interval(f"cosine of mixed inputs to anchors, {_COSINE[name]}", Estimate(value)))
    text = console.table(rows, (generations.label, "", "95 % interval"))
    return f"{text}\n{coverage(generations)}"


_COSINE = {"mean": "mean", "min": "least", "below_095": "share below 0.95"}


def coverage(generations: Generations) -> str:
    """How much of the set the metrics stand for."""
    header, done = generations.header, len(generations.problems)
    of = "" if done == header["problems"] else f" of {header['problems']}, the rest is not evaluated yet"
    return f"{done} problems{of} ({header['too_long']} left out as too long), {generations.path}"


def table_1(
    sets: Sequence[tuple[Generations, Metrics]], pass_k: Mapping[str, Sequence[int]] | None = None
) -> str:
    """Data sets across, in percent: ours unbiased, ours by the paper's bootstrap, and the paper's own.

    The paper's rows stand there where backbone and sampling are the paper's; the one of the same method is
    marked. Its metrics for a data set that is not evaluated here are not shown.
    """
    names = [generations.header["set"] for generations, _ in sets]
    asked = {g.header["set"]: tuple((pass_k or {}).get(g.header["set"], g.pass_k)) for g, _ in sets}
    samples = {g.header["set"]: g.header["depends"]["eval.samples"] for g, _ in sets}
    alike = len({(samples[name], asked[name]) for name in names}) == 1
    averaged = len(names) > 1 and alike
    columns = names + ["average"] * averaged
    of_sets = [metrics for _, metrics in sets]
    every = of_sets + [estimates.average(of_sets)] * averaged
    kinds = [asked[name] for name in names] + [asked[names[0]]] * averaged
    ours = [(f"ours, step {sets[0][0].header['step']}", "pass_at"), ("ours, best@k (bootstrap)", "best_at")]
    rows = [
        (label, *(_triple(metrics, kind, ks) for metrics, ks in zip(every, kinds, strict=True)))
        for label, kind in ours
    ]
    rows += _paper_rows(sets, names, columns)
    heads = [_head(name, samples[name], asked[name], alike) for name in names] + ["average"] * averaged
    legend = f"percent: {_legend(samples[names[0]], asked[names[0]])}" if alike else "percent"
    return console.table(rows, (legend, *heads))


def _paper_rows(
    sets: Sequence[tuple[Generations, Metrics]], names: Sequence[str], columns: Sequence[str]
) -> list[tuple[str, ...]]:
    headers = [generations.header for generations, _ in sets]
    backbone = paper.backbone(headers[0]["model"])
    if backbone is None or not all(_as_the_paper(header) for header in headers):
        return []
    method = _method(headers[0])
    same_sets = set(names) == set(paper.SETS)
    rows = []
    for name, cells in paper.TABLE[backbone].items():
        shown = [cells.get(key) if key != "average" or same_sets else None for key in columns]
        if not any(shown) or (name != method and len(cells) == 1):
            continue
        mark = "  ← this method" if name == method else ""
        rows.append((f"paper, {name}{mark}", *("–" if cell is None else _cell(cell) for cell in shown)))
    return rows


def _as_the_paper(header: Mapping[str, Any]) -> bool:
    depends = header["depends"]
    values = {leaf: depends[f"eval.{leaf}"] for leaf in _SAMPLING}
    return paper.comparable(**values, reward=depends["reward.kind"])


_SAMPLING = ("samples", "temperature", "top_p", "top_k", "max_new_tokens")


def _method(header: Mapping[str, Any]) -> str | None:
    return paper.method(
        trained=header["step"] > 0, mixes=header["depends"]["eval.mixing"], **header["trained"]
    )


def _cell(cell: paper.Cell) -> str:
    return " / ".join("–" if value is None else f"{value:.2f}" for value in cell)


def _triple(metrics: Metrics, kind: str, pass_k: Sequence[int]) -> str:
    values = [metrics["mean_at_n"], *(metrics[f"{kind}_{k}"] for k in pass_k)]
    return " / ".join(f"{100 * estimate.value:.2f}" for estimate in values)


def _legend(samples: int, pass_k: Sequence[int]) -> str:
    return " / ".join([f"Mean@{samples}", *(f"Pass@{k}" for k in pass_k)])


def _head(name: str, samples: int, pass_k: Sequence[int], alike: bool) -> str:
    title = paper.TITLES.get(name, name)
    return title if alike else f"{title}: {_legend(samples, pass_k)}"


def _with_interval(label: str, estimate: Estimate) -> tuple[str, float, str]:
    interval = "" if estimate.low is None else f"{estimate.low:.4g} to {estimate.high:.4g}"
    return label, estimate.value, interval
