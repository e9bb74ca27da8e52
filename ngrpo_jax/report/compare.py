"""Several runs -> one page: overlaid curves, seeds of one setting joined, final tables, settings that differ.

Owns which runs belong together, and the words of the comparison. Reads and writes no file.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from ngrpo_jax.evaluation.statistics import paired
from ngrpo_jax.report import curves, panels, templates
from ngrpo_jax.report.curves import Axes, Line, Points
from ngrpo_jax.report.numbers import number, percent, points, quantity
from ngrpo_jax.report.workdir import Run
from ngrpo_jax.runtime.console import format_seconds
from ngrpo_jax.schema import flatten

# Settings that make no other experiment of a run: seeds are joined, the others say where and how it ran.
_NO_EXPERIMENT = ("seed", "mesh.", "checkpoint.", "train.loggers", "train.profile", "reward.workers", "log.")
_MOST_NAMED = 3  # settings in the name of one
_COLORS = 8  # of the style sheet
_T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone; `name` says what sets them apart from the other runs."""

    name: str
    runs: list[Run]


def settings_of(runs: Sequence[Run], named: Sequence[str]) -> list[Setting]:
    """The runs, joined where all of `named` (the settings that differ) are equal.

    In order of appearance, GRPO before what is compared with it.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        values = flatten(run.config)
        groups.setdefault(tuple(_shown(values.get(name)) for name in named), []).append(run)
    found = [Setting(_name(named, members[0]), members) for members in groups.values()]
    return sorted(found, key=lambda one: not one.name.startswith("GRPO "))


def _name(named: Sequence[str], run: Run) -> str:
    """A run's values of the settings `named`: "rank 8, k 3"; "N-GRPO (rate 0.1)" where mixing differs.

    Its own name where many settings differ.
    """
    if len(named) > _MOST_NAMED:  # other experiments, which a table tells apart better than a name
        return run.name
    own = flatten(run.config)
    text = ", ".join(f"{name.split('.')[-1]} {_shown(own.get(name))}" for name in named)
    if not any(name.startswith("mixing.") for name in named):
        return text or "all runs"
    strategy = own.get("mixing.strategy", "neighbor")
    method = "N-GRPO" if strategy == "neighbor" else f"{strategy} mixing"
    return f"{'GRPO' if strategy == 'none' or own.get('mixing.rate') == 0 else method} ({text})"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"  # 0.0 of a config and 0 of a flag are one value
    return "none" if str(value) == "None" else str(value)


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    tables = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [name for name in names if len({_shown(table.get(name)) for table in tables}) > 1]


def render(runs: Sequence[Run], pages: Sequence[str] = ()) -> str:
    """The whole page; `pages`: for each run the address of its own page, "" where there is none."""
    every = differing(runs)
    settings = settings_of(runs, [name for name in every if not name.startswith(_NO_EXPERIMENT)])
    axes, keys = Axes(), list(dict.fromkeys(key for run in runs for key in run.keys))
    sections = []
    charts = []
    for section in panels.present(keys):
        shown = []
        for panel, lines in _panels(section, settings):
            charts.append(curves.as_json(panel, lines, axes))
            shown.append(
                {
                    "panel": panel,
                    "legend": curves.legend(panel, lines),
                    "described": curves.described(panel, lines),
                }
            )
        sections.append((section, shown))
    return templates.fill(
        "compare.html",
        title=" against ".join(one.name for one in settings)
        if 1 < len(settings) < 4
        else f"{len(runs)} runs",
        runs=len(runs),
        verdict=_verdict(settings),
        warning=_uneven(settings),
        sections=sections,
        finals=[_final(setting) for setting in settings],
        columns=[curves.label_of(runs[0], name) if _alike(runs) else name for name in _COLUMNS],
        pairs=_pairs(settings),
        names=[one.name for one in settings],
        distinct=len(set().union(*map(_solved, settings))),
        differing=every,
        settings=[
            (run.name, page, [_shown(flatten(run.config).get(name, "–")) for name in every])
            for run, page in zip(runs, pages or [""] * len(runs), strict=True)
        ],
        data={"axes": list(axes.known), "charts": charts},
    )


def _panels(section: panels.Section, settings: Sequence[Setting]) -> list[tuple[panels.Panel, list[Line]]]:
    """A panel for each metric: several runs in one panel leave no room for several metrics."""
    found = []
    for panel in section.panels:
        for key, label in panel.series.items():
            of_runs = [run for one in settings for run in one.runs]
            label = curves.label_of(of_runs[0], label) if _alike(of_runs) else label
            title = panel.title if len(panel.series) == 1 else f"{panel.title}: {label}"
            lines = [line for n, one in enumerate(settings) for line in _lines(one, key, n, panel.unit)]
            kind = "log" if panel.kind == "log" else "lines"
            if lines:
                found.append((panel._replace(title=title, kind=kind), lines))
    return found


def _alike(runs: Sequence[Run]) -> bool:
    """Whether n of Mean@n and k of Pass@k are the same in all runs."""
    return len(set(map(curves.samples_and_k, runs))) == 1


def _lines(setting: Setting, key: str, color: int, unit: str) -> list[Line]:
    """The mean over seeds with the band from the least to the largest; of one run its own line.

    Of times the median: one step during which the machine was busy otherwise says nothing of a setting.
    """
    found = [curve for curve in (curves.points(run, key) for run in setting.runs) if curve.steps]
    lines = (
        [joined(found, statistics.median if unit == "s" else statistics.fmean)] if len(found) > 1 else found
    )
    return [Line(setting.name, curve, color % _COLORS) for curve in lines if curve.steps]


def joined(of_seeds: Sequence[Points], middle: Callable[[list[float]], float] = statistics.fmean) -> Points:
    """The middle, least and largest value at every step that all seeds have."""
    tables = [dict(zip(one.steps, one.values, strict=True)) for one in of_seeds]
    steps = tuple(sorted(set.intersection(*(set(table) for table in tables))))
    columns = [[v for table in tables if (v := table[step]) is not None] for step in steps]
    means = [middle(column) if column else None for column in columns]
    low, high = ([pick(column) if column else None for column in columns] for pick in (min, max))
    return Points(steps, means, low, high)


def _last(run: Run, key: str) -> float | None:
    curve = curves.points(run, f"eval/{key}")
    return curve.values[-1] if curve.values else run.summary.get(f"{key}_after")


def _interval_over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    t = _T_95[len(values) - 2] if len(values) - 2 < len(_T_95) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _share_interval(interval: tuple[float, float]) -> str:
    """An interval of a share: Student's t knows nothing of the bounds that a share has."""
    low, high = interval
    cut = [f"{bound}" for bound, beyond in ((0, low < 0), (100, high > 1)) if beyond]
    words = f" (cut at {' and '.join(cut)})" if cut else ""
    return f"{percent(max(low, 0.0))} to {percent(min(high, 1.0))}{words}"


_COLUMNS = (
    *("setting", "accuracy (Mean@n)", "95 % interval", "best evaluation", "Pass@k", "tokens a response"),
    *("time a step (median)", "runs", "at step"),
)


def _final(setting: Setting) -> list[str]:
    """A row of the final table."""
    means = [value for run in setting.runs if (value := _last(run, "mean_at_n")) is not None]
    passes = [value for run in setting.runs if (value := _last(run, "pass_at_k")) is not None]
    lengths = [value for run in setting.runs if (value := _last(run, "length_mean")) is not None]
    seconds = [s for run in setting.runs for s in run.values("time/step")[1]]
    over_seeds = _interval_over_seeds(means)
    interval = _share_interval(over_seeds) if over_seeds else _own_interval(setting.runs[0])
    best = [max(v for v in found if v is not None) for run in setting.runs if (found := _means(run))]
    return [
        setting.name,
        percent(statistics.fmean(means)) if means else "–",
        (interval if means else "") or "–",
        percent(statistics.fmean(best)) if best else "–",
        percent(statistics.fmean(passes)) if passes else "–",
        quantity(statistics.fmean(lengths), "") if lengths else "–",
        format_seconds(statistics.median(seconds)) if seconds else "–",
        number(len(setting.runs)),
        " and ".join(map(number, _last_steps([setting]))) or "–",
    ]


def _means(run: Run) -> list[float | None]:
    return curves.points(run, "eval/mean_at_n").values


def _own_interval(run: Run) -> str:
    curve = curves.points(run, "eval/mean_at_n")
    if not curve.low or curve.low[-1] is None or curve.high is None:
        return ""
    return f"{percent(curve.low[-1])} to {percent(curve.high[-1] or 0)}"


def _solved(setting: Setting) -> dict[str, tuple[float, bool]]:
    """Problem -> (share of correct responses over all seeds, solved by any) at the last evaluation."""
    found: dict[str, list[float]] = {}
    for run in setting.runs:
        rows = [row for row in run.evaluations if row.get("correct")]
        for key, count in (rows[-1]["correct"] if rows else {}).items():
            found.setdefault(key, []).append(count / rows[-1]["samples"])
    return {key: (statistics.fmean(shares), max(shares) > 0) for key, shares in found.items()}


def _common(a: Setting, b: Setting) -> tuple[list[tuple[float, bool]], list[tuple[float, bool]]] | None:
    """What `_solved` has for the problems that both were evaluated on, in one order; None where none is."""
    of_a, of_b = _solved(a), _solved(b)
    common = [key for key in of_a if key in of_b]
    return ([of_a[key] for key in common], [of_b[key] for key in common]) if common else None


def _difference(a: Setting, b: Setting) -> tuple[float, float, float]:
    """(difference of Mean@n, B's less A's, low, high), by bootstrap over the problems that both have."""
    common = _common(a, b)
    assert common is not None
    return paired.difference_interval(*(np.array([share for share, _ in of]) for of in common))


def _pairs(settings: Sequence[Setting]) -> list[list[str]]:
    """A row for each pair of settings: what each alone solves, McNemar's test, the difference of Mean@n."""
    rows = []
    for a, b in itertools.combinations(settings, 2):
        if not (common := _common(a, b)):
            continue
        table = paired.paired_table(*(np.array([solved for _, solved in of]) for of in common))
        gap, low, high = _difference(a, b)
        p_value = paired.mcnemar(table.only_a, table.only_b)
        rows.append(
            [
                f"{b.name} against {a.name}",
                f"{points(gap)} ({points(low)} to {points(high)})",
                *map(number, table),
                "below 0.001" if p_value < 0.001 else f"{p_value:.3f}",
            ]
        )
    return rows


def _by_seed(a: Setting, b: Setting) -> list[float]:
    """Differences of Mean@n, B's less A's, of runs with the same seed; empty where the seeds differ."""
    of_a, of_b = ({run.config.get("seed"): _last(run, "mean_at_n") for run in one.runs} for one in (a, b))
    whole = len(of_a) == len(a.runs) and len(of_b) == len(b.runs) and None not in of_a
    if not whole or of_a.keys() != of_b.keys():
        return []
    pairs = [(of_a[seed], of_b[seed]) for seed in of_a]
    return [y - x for x, y in pairs if x is not None and y is not None]


def _verdict(settings: Sequence[Setting]) -> str:
    """The comparison of two settings in a sentence; empty where there are not two, or nothing to pair.

    A difference counts where neither other problems nor other seeds would explain it.
    """
    if len(settings) != 2 or not _pairs(settings):
        return ""
    a, b = settings
    (gap, low, high), by_seed = _difference(a, b), _by_seed(a, b)
    over_seeds = _interval_over_seeds(by_seed)
    intervals = [(low, high), over_seeds] if over_seeds else [(low, high)]
    chance = any(bottom <= 0 <= top for bottom, top in intervals)
    found = "No difference beyond chance" if chance else "A difference beyond chance"
    sentence = (
        f"{found}: {b.name} against {a.name} is {points(gap)} points of held-out accuracy at the last "
        f"evaluation, each problem counted once{_of_seeds(a, b, gap)}; 95 % interval over problems "
        f"{points(low)} to {points(high)}"
    )
    if over_seeds:
        each = ", ".join(map(points, by_seed))
        bounds = " to ".join(map(points, over_seeds))
        sentence += f", over {len(by_seed)} seeds {bounds} (seed by seed {each})"
    return sentence + "."


def _of_seeds(a: Setting, b: Setting, gap: float) -> str:
    """The difference of the means over seeds, where it is another: seeds may have problems of their own."""
    found = [[v for run in one.runs if (v := _last(run, "mean_at_n")) is not None] for one in (a, b)]
    if not all(found):
        return ""
    of_means = points(statistics.fmean(found[1]) - statistics.fmean(found[0]))
    return "" if of_means == points(gap) else f" (the means over seeds differ by {of_means})"


def _last_steps(settings: Sequence[Setting]) -> list[int]:
    """The steps of the runs' last evaluations, each once."""
    steps = {run.evaluations[-1]["step"] for one in settings for run in one.runs if run.evaluations}
    return sorted(steps)


def _uneven(settings: Sequence[Setting]) -> str:
    """A sentence where the last evaluations are not of the same step: then they cannot be compared."""
    steps = _last_steps(settings)
    if len(steps) < 2:
        return ""
    last = ", ".join(map(number, steps))
    return f"The last evaluations are of different steps ({last}): some runs have not ended, or are shorter."
