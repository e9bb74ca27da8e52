"""One run -> one self-contained HTML page: key metrics, curves, responses, all metrics, settings.

Owns the order and words of the page; templates/run.html is its HTML. Reads and writes no file.
"""

from collections.abc import Iterator
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup

from ngrpo_jax.report import charts, panels, samples, templates
from ngrpo_jax.report.workdir import Run
from ngrpo_jax.runtime.console import format_seconds
from ngrpo_jax.schema import flatten

Facts = list[tuple[str, Any]]


class Card(NamedTuple):
    """A key metric; `tone` is "good", "bad" or "" and colours the detail."""

    name: str
    value: str
    detail: str
    tone: str = ""


def render(run: Run) -> str:
    """The whole page."""
    plain: Facts = [(name, value) for name, value in run.config.items() if not isinstance(value, dict)]
    tables = [("run", plain)] * bool(plain)
    tables += [(name, list(value.items())) for name, value in run.config.items() if isinstance(value, dict)]
    return templates.fill(
        "run.html",
        title=run.name,
        subtitle=_subtitle(flatten(run.config)),
        cards=[card for card in _cards(run) if card.value],
        places=[(name, run.summary[name]) for name in ("checkpoint", "export") if run.summary.get(name)],
        window=charts.window(len(run.rows)),
        missing=run.missing,
        sections=[
            (section, [_chart(run, panel) for panel in section.panels])
            for section in panels.present(run.keys)
        ],
        samples=[samples.shown(sample) for sample in samples.spread(run.samples)],
        written=len(run.samples),
        metrics=[_metric(run, key) for key in sorted(run.keys)],
        settings=[(name, [(key, "none" if v is None else v) for key, v in rows]) for name, rows in tables],
    )


def number(value: Any) -> str:
    """A value at a readable precision: whole numbers in full, others to four digits."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "\u2212")
    return f"{value:.4g}".replace("-", "\u2212")


def quantity(value: float, unit: str) -> str:
    """A value with its unit, as a panel shows it."""
    if unit == "%":
        return f"{100 * value:.1f} %"
    return format_seconds(value) if unit == "s" else number(value)


def _subtitle(settings: dict[str, Any]) -> str:
    parts = [str(settings["model.path"])] if settings.get("model.path") else []
    strategy, rate = settings.get("mixing.strategy"), settings.get("mixing.rate")
    if strategy is not None and rate is not None:
        mixing = f"{strategy} mixing, ρ = {rate}, k = {settings.get('mixing.k')}"
        parts.append("no mixing (plain GRPO)" if strategy == "none" or rate == 0 else mixing)
    if settings.get("rollout.prompts") is not None:
        parts.append(f"{settings['rollout.prompts']} prompts × {settings.get('rollout.group')} a step")
    return " · ".join(parts)


def _cards(run: Run) -> Iterator[Card]:
    """The key metrics of the run; a card without a value has nothing to show."""
    settings = flatten(run.config)
    n, k = settings.get("eval.samples") or "n", settings.get("eval.pass_k") or "k"
    yield _change_card(f"Held-out Mean@{n}", run.summary, "mean_at_n")
    yield _change_card(f"Held-out Pass@{max(k) if isinstance(k, list) else k}", run.summary, "pass_at_k")
    _, rewards = run.values("reward/mean")
    if rewards:
        few = max(1, len(rewards) // 10)
        detail = f"{fmean(rewards[:few]):.3f} at the start"
        yield Card("Training reward", f"{fmean(rewards[-few:]):.3f}", detail)
    wanted, seconds = settings.get("train.steps"), run.summary.get("seconds")
    detail = format_seconds(seconds) + " in all" if isinstance(seconds, int | float) else ""
    last = max(row["step"] for row in run.rows)
    yield Card("Steps", number(last), detail or (f"of {number(wanted)}" if wanted else ""))
    _, mixed = run.values("rollout/mixed_fraction")
    _, cosines = run.values("rollout/mix_cosine_mean")
    if mixed:
        detail = f"cosine to the anchor {fmean(cosines):.4f}" if cosines else ""
        yield Card("Mixed tokens", f"{100 * fmean(mixed):.1f} %", detail)
    _, gaps = run.values("gap/mean")
    _, largest = run.values("gap/max")
    if gaps:
        detail = f"at most {max(largest):.2g} nats" if largest else "nats, mean"
        yield Card("Sampler/learner gap", f"{fmean(gaps):.2g}", detail)


def _change_card(name: str, summary: dict[str, Any], key: str) -> Card:
    before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return Card(name, "", "")
    change = 100 * (after - before)
    detail = f"{100 * before:.1f} % before, {change:+.1f} points".replace("-", "\u2212")
    return Card(name, f"{100 * after:.1f} %", detail, "good" if change > 0 else "bad" if change < 0 else "")


def _chart(run: Run, panel: panels.Panel) -> dict[str, Any]:
    """A panel with its drawing and its legend; the label of the drawing gives its values in words."""
    series = [
        charts.Series(label, *run.values(key), color=charts.COLORS[index % len(charts.COLORS)])
        for index, (key, label) in enumerate(panel.series.items())
    ]
    if panel.kind == "stack" and set.intersection(*(set(one.steps) for one in series)):
        drawing = charts.stack_chart(series, unit=panel.unit)
    else:
        drawing = charts.line_chart(series, unit=panel.unit, log=panel.kind == "log")
    ends = [[quantity(one.values[place], panel.unit) for place in (0, -1)] for one in series]
    described = [f"{one.label} from {a} to {b}" for one, (a, b) in zip(series, ends, strict=True)]
    return {
        "panel": panel,
        "drawing": labelled(drawing, f"{panel.title}: {'; '.join(described)}"),
        "legend": [
            {"color": one.color, "label": one.label, "last": last}
            for one, (_, last) in zip(series, ends, strict=True)
        ],
    }


def labelled(drawing: str, label: str) -> Markup:
    """An SVG with a label for screen readers."""
    return Markup(drawing.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(label), 1))


def _metric(run: Run, key: str) -> list[str]:
    """A metric's row: first, last, least, largest value, mean, and how many steps have it."""
    steps, values = run.values(key)
    cells = (values[0], values[-1], min(values), max(values), fmean(values), len(steps))
    return [key, *map(number, cells)]
