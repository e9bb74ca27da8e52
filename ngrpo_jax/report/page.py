"""One run -> one self-contained HTML page: key metrics, curves, responses, all metrics, settings.

Owns the order and words of the page. Escapes every text that comes from the run. Reads and writes no file.
"""

from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

from ngrpo_jax.report import charts, panels
from ngrpo_jax.report.samples import samples_section
from ngrpo_jax.report.style import document
from ngrpo_jax.report.workdir import Run
from ngrpo_jax.runtime.console import format_seconds


def render(run: Run) -> str:
    """The whole page."""
    sections = panels.present(run.keys)
    titles = [section.title for section in sections] + ["Responses, read"] * bool(run.samples)
    titles += ["All metrics"] + ["Settings"] * bool(run.config)
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title in titles)
    body = [
        f'<div class="eyebrow">N-GRPO run</div><h1>{escape(run.name)}</h1>{_subtitle(run)}<nav>{links}</nav>',
        _cards(run),
        _notes(run),
        *(_section(run, section) for section in sections),
        samples_section(run.samples, _heading("Responses, read")) if run.samples else "",
        _heading("All metrics") + _metrics_table(run),
        _heading("Settings") + _settings(run.config) if run.config else "",
    ]
    return document(run.name, "".join(body))


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


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _heading(title: str) -> str:
    return f'<h2 id="{_anchor(title)}">{escape(title)}</h2>'


def _setting(run: Run, section: str, name: str) -> Any:
    found = run.config.get(section)
    return found.get(name) if isinstance(found, dict) else None


def _subtitle(run: Run) -> str:
    parts = [str(_setting(run, "model", "path"))] if _setting(run, "model", "path") else []
    strategy, rate = _setting(run, "mixing", "strategy"), _setting(run, "mixing", "rate")
    if strategy is not None and rate is not None:
        mixing = f"{strategy} mixing, ρ = {rate}, k = {_setting(run, 'mixing', 'k')}"
        parts.append("no mixing (plain GRPO)" if strategy == "none" or rate == 0 else mixing)
    if _setting(run, "rollout", "prompts") is not None:
        parts.append(
            f"{_setting(run, 'rollout', 'prompts')} prompts × {_setting(run, 'rollout', 'group')} a step"
        )
    return f'<p class="soft">{escape(" · ".join(parts))}</p>' if parts else ""


def _cards(run: Run) -> str:
    n, k = _setting(run, "eval", "samples") or "n", _setting(run, "eval", "pass_k") or "k"
    k = max(k) if isinstance(k, list) else k
    cards = [
        _change_card(f"Held-out Mean@{n}", run.summary, "mean_at_n"),
        _change_card(f"Held-out Pass@{k}", run.summary, "pass_at_k"),
    ]
    _, rewards = run.values("reward/mean")
    if rewards:
        few = max(1, len(rewards) // 10)
        detail = f"{fmean(rewards[:few]):.3f} at the start"
        cards.append(_card("Training reward", f"{fmean(rewards[-few:]):.3f}", detail))
    wanted = _setting(run, "train", "steps")
    last = max(row["step"] for row in run.rows)
    seconds = run.summary.get("seconds")
    detail = format_seconds(seconds) + " in all" if isinstance(seconds, int | float) else ""
    cards.append(_card("Steps", number(last), detail or (f"of {number(wanted)}" if wanted else "")))
    _, mixed = run.values("rollout/mixed_fraction")
    if mixed:
        _, cosines = run.values("rollout/mix_cosine_mean")
        detail = f"cosine to the anchor {fmean(cosines):.4f}" if cosines else ""
        cards.append(_card("Mixed tokens", f"{100 * fmean(mixed):.1f} %", detail))
    _, gaps = run.values("gap/mean")
    if gaps:
        _, largest = run.values("gap/max")
        detail = f"at most {max(largest):.2g} nats" if largest else "nats, mean"
        cards.append(_card("Sampler/learner gap", f"{fmean(gaps):.2g}", detail))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(name: str, value: str, detail: str, tone: str = "") -> str:
    shown = f'<span class="{tone}">{escape(detail)}</span>' if tone else escape(detail)
    return (
        f'<div class="card"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="detail">{shown}</div></div>'
    )


def _change_card(name: str, summary: dict[str, Any], key: str) -> str:
    before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return ""
    change = 100 * (after - before)
    detail = f"{100 * before:.1f} % before, {change:+.1f} points".replace("-", "\u2212")
    tone = "good" if change > 0 else "bad" if change < 0 else ""
    return _card(name, f"{100 * after:.1f} %", detail, tone)


def _notes(run: Run) -> str:
    where = [(name, run.summary[name]) for name in ("checkpoint", "export") if run.summary.get(name)]
    items = "".join(f"<dt>{name}</dt><dd><code>{escape(str(path))}</code></dd>" for name, path in where)
    text = f'<div class="box"><dl class="facts">{items}</dl></div>' if items else ""
    width = charts.window(len(run.rows))
    if width > 1:
        text += f'<p class="note">Thin curves show every step, bold ones the running mean over {width}.</p>'
    if run.missing:
        lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.missing)
        text += f'<div class="box warn">Not in this workdir:<ul>{lines}</ul></div>'
    return text


def _section(run: Run, section: panels.Section) -> str:
    drawn = "".join(_panel(run, panel) for panel in section.panels)
    note = f'<p class="soft">{escape(section.note)}</p>'
    return f'{_heading(section.title)}{note}<div class="panels">{drawn}</div>'


def _panel(run: Run, panel: panels.Panel) -> str:
    series = [
        charts.Series(label, *run.values(key), color=charts.COLORS[index % len(charts.COLORS)])
        for index, (key, label) in enumerate(panel.series.items())
    ]
    shared = set.intersection(*(set(one.steps) for one in series))
    if panel.kind == "stack" and shared:
        drawing = charts.stack_chart(series, unit=panel.unit)
    else:
        drawing = charts.line_chart(series, unit=panel.unit, log=panel.kind == "log")
    legend = "".join(
        f'<span><i style="background:{one.color}"></i>{escape(one.label)} '
        f"<b>{quantity(one.values[-1], panel.unit)}</b></span>"
        for one in series
    )
    described = "; ".join(
        f"{one.label} from {quantity(one.values[0], panel.unit)} to {quantity(one.values[-1], panel.unit)}"
        for one in series
    )
    label = escape(f"{panel.title}: {described}", quote=True)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    unit = f' <span class="unit">{escape(panel.unit)}</span>' if panel.unit and panel.unit != "%" else ""
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    return (
        f'<figure class="panel"><figcaption>{escape(panel.title)}{unit}</figcaption>'
        f'<div class="legend">{legend}</div>{drawing}{note}</figure>'
    )


def _metrics_table(run: Run) -> str:
    lines = []
    for key in sorted(run.keys):
        steps, values = run.values(key)
        cells = (values[0], values[-1], min(values), max(values), fmean(values), len(steps))
        lines.append(_row([f"<code>{escape(key)}</code>", *(number(cell) for cell in cells)]))
    head = _row(["metric", "first", "last", "least", "largest", "mean", "rows"], "th")
    return (
        f'<details><summary>{len(lines)} metrics: first, last, extremes</summary><div class="scroll">'
        f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _settings(config: dict[str, Any]) -> str:
    plain = {name: value for name, value in config.items() if not isinstance(value, dict)}
    sections = ([("run", plain)] if plain else []) + [
        (n, v) for n, v in config.items() if isinstance(v, dict)
    ]
    blocks = "".join(
        f"<section><h3>{escape(name)}</h3>{_facts(values)}</section>" for name, values in sections
    )
    return f'<details open><summary>config.json</summary><div class="settings">{blocks}</div></details>'


def _facts(values: dict[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape('none' if value is None else str(value))}</dd>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{items}</dl>'
