"""What an evaluation prints: each data set's metrics with intervals, and the paper's results beside ours.

Owns the words and the layout. Takes generations as read from a file, so that a stored evaluation prints what
was printed when its responses were made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ngrpo_jax.evaluation.answers import answer_name
from ngrpo_jax.evaluation.generations import Generations
from ngrpo_jax.evaluation.statistics import estimates, paper
from ngrpo_jax.evaluation.statistics.estimates import Estimate
from ngrpo_jax.runtime import console

Metrics = Mapping[str, Estimate]

_COSINE = {"mean": "mean", "min": "smallest", "below_095": "share below 0.95"}


def details(generations: Generations, metrics: Metrics, pass_k: Sequence[int]) -> str:
    """One data set's table: metric, value, 95 % interval; and how much of the set has been evaluated."""
    names = {f"Mean@{generations.samples}": "mean_at_n"}
    for k in pass_k:
        names |= {f"Pass@{k}": f"pass_at_{k}", f"best@{k} (bootstrap, as the paper's tables)": f"best_at_{k}"}
    if "maj_at_n" in metrics:
        names[f"Maj@{generations.samples}"] = "maj_at_n"
    names |= {
        "truncated responses": "truncated",
        f"responses with {answer_name(generations.reward_kind)}": "no_answer",
        "tokens a response": "length_mean",
        "tokens of the longest": "length_max",
    }
    rows = [_with_interval(label, metrics[name]) for label, name in names.items()]
    for name, value in (generations.cosines() or {}).items():
        rows.append(_with_interval(f"cosine of mixed inputs to anchors, {_COSINE[name]}", Estimate(value)))
    header, done = generations.header, len(generations.problems)
    of = "" if done == header["problems"] else f" of {header['problems']}, the rest is not evaluated yet"
    return (
        f"{console.table(rows, (generations.label, '', '95 % interval'))}\n"
        f"{done} problems{of} ({header['too_long']} left out as too long), {generations.path}"
    )


def table_1(sets: Sequence[tuple[Generations, Metrics]], pass_k: Sequence[int] | None = None) -> str:
    """Data sets as columns, in percent: our unbiased Pass@k, our bootstrap as the paper's, and the paper's.

    The paper's rows are shown where backbone and sampling are the paper's; the row of the same method is
    marked. Data sets that are not evaluated here have no column.

    Args:
      pass_k: None for each set's own; the column "average" needs the same of all sets.
    """
    names = [generations.header["set"] for generations, _ in sets]
    columns = [(generations.samples, tuple(pass_k or generations.pass_k)) for generations, _ in sets]
    metrics = [of_set for _, of_set in sets]
    alike = len(set(columns)) == 1
    titles = [paper.TITLES.get(name, name) for name in names]
    if alike:
        legend = f"percent: {_legend(*columns[0])}"
    else:
        legend = "percent"
        titles = [f"{title}: {_legend(*column)}" for title, column in zip(titles, columns, strict=True)]
    if alike and len(names) > 1:
        names, titles = [*names, "average"], [*titles, "average"]
        columns, metrics = [*columns, columns[0]], [*metrics, estimates.average(metrics)]
    ours = [(f"ours, step {sets[0][0].header['step']}", "pass_at"), ("ours, best@k (bootstrap)", "best_at")]
    rows = [
        (label, *(_triple(one, kind, ks) for one, (_, ks) in zip(metrics, columns, strict=True)))
        for label, kind in ours
    ]
    rows += _paper_rows([generations.header for generations, _ in sets], names)
    return console.table(rows, (legend, *titles))


def _paper_rows(headers: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[tuple[str, ...]]:
    backbone = paper.backbone(headers[0]["model"])
    if backbone is None or not all(paper.comparable(header["depends"]) for header in headers):
        return []
    method = paper.method(
        trained=headers[0]["step"] > 0,
        mixes=headers[0]["depends"]["eval.mixing"],
        **headers[0]["trained"],
    )
    same_sets = {header["set"] for header in headers} == set(paper.SETS)
    rows = []
    for name, cells in paper.TABLE[backbone].items():
        shown = [cells.get(column) if column != "average" or same_sets else None for column in columns]
        # A row that has the average alone is of an ablation: shown for the same method only.
        if not any(shown) or (name != method and len(cells) == 1):
            continue
        mark = "  ← this method" if name == method else ""
        rows.append((f"paper, {name}{mark}", *("–" if cell is None else _cell(cell) for cell in shown)))
    return rows


def _cell(cell: paper.Cell) -> str:
    return " / ".join("–" if value is None else f"{value:.2f}" for value in cell)


def _triple(metrics: Metrics, kind: str, pass_k: Sequence[int]) -> str:
    shown = [metrics["mean_at_n"], *(metrics[f"{kind}_{k}"] for k in pass_k)]
    return " / ".join(f"{100 * estimate.value:.2f}" for estimate in shown)


def _legend(samples: int, pass_k: Sequence[int]) -> str:
    return " / ".join([f"Mean@{samples}", *(f"Pass@{k}" for k in pass_k)])


def _with_interval(label: str, estimate: Estimate) -> tuple[str, float, str]:
    interval = "" if estimate.low is None else f"{estimate.low:.4g} to {estimate.high:.4g}"
    return label, estimate.value, interval
