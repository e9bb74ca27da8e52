"""One run -> one self-contained HTML page: verdict, curves, rollouts, mixing, held-out problems, settings.

Owns the order and words of the page; templates/run.html is its HTML. Reads and writes no file.
"""

from collections.abc import Iterator
from pathlib import PurePath
from statistics import fmean
from typing import Any, NamedTuple

from ngrpo_jax.report import curves, held_out, mixing, panels, templates
from ngrpo_jax.report.numbers import number, percent, points, quantity
from ngrpo_jax.report.samples import Encoder
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
    axes, encoder, sections = curves.Axes(), Encoder(), curves.of_run(run)
    charts = [curves.as_json(panel, lines, axes) for _, of_section in sections for panel, lines in of_section]
    groups = [encoder.group(rows) for rows in run.samples.shown]
    return templates.fill(
        "run.html",
        title=run.name,
        subtitle=subtitle(flatten(run.config)),
        verdict=held_out.verdict(run),
        cards=[card for card in _cards(run) if card.value],
        places=_places(run),
        restarts=[(row["step"], row.get("time", "")) for row in run.restarts],
        missing=run.missing,
        sections=[(section, _shown(of_section)) for section, of_section in sections],
        samples=run.samples,
        mixing=mixing.summary(run.samples.mixtures, run),
        problems=held_out.problems(run),
        metrics=[_metric(run, key) for key in sorted(run.keys)],
        settings=_settings(run),
        data={
            "axes": list(axes.known),
            "charts": charts,
            "restarts": [row["step"] for row in run.restarts],
            "groups": groups,
            "nearest": flatten(run.config).get("mixing.strategy") == "neighbor",
            "texts": list(encoder.texts),
        },
    )


def _shown(of_section: list[tuple[panels.Panel, list[curves.Line]]]) -> list[dict[str, Any]]:
    return [
        {
            "panel": panel,
            "legend": curves.legend(panel, lines),
            "described": curves.described(panel, lines),
        }
        for panel, lines in of_section
    ]


def subtitle(settings: dict[str, Any]) -> str:
    """What a run is, by its settings: model, mixing, size of a step."""
    model = str(settings.get("model.path") or "")
    # Of a local directory its own name; a hub name, ORG/MODEL, stays whole.
    parts = [PurePath(model).name if PurePath(model).is_absolute() else model] if model else []
    strategy, rate = settings.get("mixing.strategy"), settings.get("mixing.rate")
    if strategy is not None and rate is not None:
        mixes = f"{strategy} mixing, ρ = {rate}, k = {settings.get('mixing.k')}"
        parts.append("no mixing (plain GRPO)" if strategy == "none" or rate == 0 else mixes)
    if settings.get("rollout.prompts") is not None:
        parts.append(f"{settings['rollout.prompts']} prompts × {settings.get('rollout.group')} a step")
    return " · ".join(parts)


def _places(run: Run) -> Facts:
    # The last parts of each path, those within the workdir: it may have been moved since.
    names = (("latest", "checkpoint", 2), ("best", "best_checkpoint", 2), ("export", "export", 1))
    return [
        (label, "/".join(PurePath(str(run.summary[name])).parts[-within:]))
        for label, name, within in names
        if run.summary.get(name)
    ]


def _settings(run: Run) -> list[tuple[str, Facts]]:
    plain: Facts = [(name, value) for name, value in run.config.items() if not isinstance(value, dict)]
    tables = [("run", plain)] * bool(plain)
    tables += [(name, list(value.items())) for name, value in run.config.items() if isinstance(value, dict)]
    return [(name, [(key, "none" if v is None else v) for key, v in rows]) for name, rows in tables]


def _cards(run: Run) -> Iterator[Card]:
    """The key metrics of the run; a card without a value has nothing to show."""
    settings = flatten(run.config)
    n, k = curves.samples_and_k(run)
    yield _change_card(f"Held-out Mean@{n or 'n'}", run, "mean_at_n", held_out.change_interval(run))
    of_pass = held_out.change_interval(run, k) if k else None
    yield _change_card(f"Held-out Pass@{k or 'k'}", run, "pass_at_k", of_pass)
    _, rewards = run.values("reward/mean")
    if rewards:
        few = max(1, len(rewards) // 10)
        means, steps = (fmean(rewards[:few]), fmean(rewards[-few:])), "step" if few == 1 else f"{few} steps"
        detail = f"mean of the last {steps}; {means[0]:.3f} of the first"
        yield Card("Training reward", f"{means[1]:.3f}", detail)
    wanted, seconds = settings.get("train.steps"), run.summary.get("seconds")
    detail = format_seconds(seconds) + " in all" if isinstance(seconds, int | float) else ""
    last = max(row["step"] for row in run.rows)
    yield Card("Steps", number(last), detail or (f"of {number(wanted)}" if wanted else ""))
    _, mixed = run.values("rollout/mixed_fraction")
    _, cosines = run.values("rollout/mix_cosine_mean")
    if mixed:
        rate, until = settings.get("mixing.rate"), settings.get("mixing.until")
        parts = [f"rate {percent(rate)}" + (f", until {until}" if until else "")] if rate else []
        parts += [f"cosine to the anchor {fmean(cosines):.4f}"] if cosines else []
        yield Card("Mixed tokens", percent(fmean(mixed)), "; ".join(parts))
    _, gaps = run.values("gap/mean")
    _, largest = run.values("gap/max")
    if gaps:
        detail = f"at most {number(max(largest))} nats" if largest else "nats, mean"
        yield Card("Sampler/learner gap", number(fmean(gaps)), detail)


def _change_card(name: str, run: Run, key: str, interval: tuple[float, float] | None) -> Card:
    """A held-out metric and its change, coloured where that is beyond chance."""
    ends = held_out.ends(run, key)
    if ends is None:
        return Card(name, "", "")
    before, after = ends
    beyond = interval is not None and not interval[0] <= 0 <= interval[1]
    tone = "" if not beyond else "good" if after > before else "bad"
    within = " (within chance)" if interval is not None and not beyond else ""
    change = f"{percent(before)} before, {points(after - before)} points{within}"
    return Card(name, percent(after), change, tone)


def _metric(run: Run, key: str) -> list[str]:
    """A metric's row: first, last, least, largest value, mean, and how many steps have it."""
    curve = curves.points(run, key)
    values = [value for value in curve.values if value is not None]
    cells = (values[0], values[-1], min(values), max(values), fmean(values))
    return [key, *(quantity(cell, panels.unit_of(key)) for cell in cells), number(len(values))]
