"""Records -> docs/study.md and its plot: every number of the page is computed here, from the raw files alone.

Owns which comparisons the page makes, and their words. `page.md` holds the text around the numbers, with a
place `{name}` for each table and sentence. Must not know how runs are made.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study import analysis, plan, store
from benchmarks.study.analysis import Difference
from benchmarks.study.arms import ARMS, CORE
from benchmarks.study.store import Record
from benchmarks.study.tasks import TASKS
from benchmarks.study.trial import unpacked

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "study.md"
PLOT = ROOT / "docs" / "pictures" / "study.svg"
CONTRASTS = (("ngrpo", "grpo"), ("ngrpo", "k1"), ("ngrpo", "random"))  # of the primary family, on each task
SECONDARY = (("k1", "grpo"), ("random", "grpo"))
Runs = Mapping[tuple[str, str], dict[int, Record]]  # (task, arm) -> seed -> record
Score = Callable[[Record], np.ndarray]  # a record -> one value a problem


def _pass(k: int) -> Score:
    return lambda record: analysis.pass_at(k, unpacked(record["correct"]), record["samples"])


SCORES: dict[str, Score] = {
    "Mean@64": lambda record: unpacked(record["correct"]) / record["samples"],
    "Pass@8": _pass(8),
    "Pass@16": _pass(16),
    "Pass@32": _pass(32),
}
COUNTS: dict[str, Score] = {
    "correct paths": lambda record: unpacked(record["correct_paths"]).astype(float),
    "paths": lambda record: unpacked(record["paths"]).astype(float),
}
PRIMARY = "Pass@32"


def by_arm(records: Sequence[Record]) -> Runs:
    """The records by task and arm, then by seed."""
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        found.setdefault((record["task"], record["arm"]), {})[record["seed"]] = record
    return found


def gaps(runs: Runs, task: str, arm: str, other: str, score: Score) -> np.ndarray:
    """arm - other for each problem of each seed that both have, float [S, P]; empty without such seeds."""
    first, second = runs.get((task, arm), {}), runs.get((task, other), {})
    seeds = sorted(first.keys() & second.keys())
    return np.array([score(first[seed]) - score(second[seed]) for seed in seeds])


def difference(runs: Runs, task: str, arm: str, other: str, score: Score) -> Difference | None:
    """The paired difference of two arms; None with fewer than two seeds in common."""
    found = gaps(runs, task, arm, other, score)
    return analysis.paired_difference(found) if len(found) > 1 else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison of the primary family."""

    task: str
    arm: str
    other: str
    difference: Difference | None
    adjusted_p: float = 1.0

    @property
    def verdict(self) -> str:
        """Its outcome, or that it did not run."""
        return "not run" if self.difference is None else analysis.verdict(self.difference, self.adjusted_p)


def primary(runs: Runs) -> list[Comparison]:
    """The primary family, its p-values adjusted by Holm over the comparisons that ran."""
    pairs = [(task, *contrast) for task in plan.CORE_TASKS for contrast in CONTRASTS]
    found = [difference(runs, *pair, SCORES[PRIMARY]) for pair in pairs]
    adjusted = iter(analysis.holm([one.p for one in found if one is not None]))
    return [
        Comparison(*pair, one, 1.0 if one is None else next(adjusted))
        for pair, one in zip(pairs, found, strict=True)
    ]


def points(value: float) -> str:
    """A share as percentage points with a sign."""
    return f"{100 * value:+.1f}"


def interval(low: float, high: float) -> str:
    """An interval of shares in percentage points."""
    return f"{points(low)} … {points(high)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def primary_table(runs: Runs, comparisons: Sequence[Comparison]) -> str:
    """Differences in the primary outcome with both intervals, p by Holm, and outcomes."""
    rows = []
    for one in comparisons:
        name = f"{ARMS[one.arm].title} − {ARMS[one.other].title}"
        d = one.difference
        figures = ["0", "–", "–", "–", "–"]
        if d is not None:
            drawn = analysis.hierarchical_interval(gaps(runs, one.task, one.arm, one.other, SCORES[PRIMARY]))
            both = interval(d.low, d.high), interval(*drawn)
            figures = [str(d.seeds), points(d.value), *both, f"{one.adjusted_p:.2g}"]
        rows.append([one.task, name, *figures, one.verdict])
    head = ("task", "difference", "seeds", PRIMARY, "t interval", "bootstrap interval", "p (Holm)", "outcome")
    return table(head, rows)


def secondary_table(runs: Runs) -> str:
    """The other outcomes of all core contrasts: differences with t intervals, not adjusted."""
    rows = []
    for task in plan.CORE_TASKS:
        for arm, other in (*CONTRASTS, *SECONDARY):
            cells = [task, f"{arm} − {other}"]
            for score in SCORES.values():
                cells.append(_points_with_interval(difference(runs, task, arm, other, score)))
            for score in COUNTS.values():
                d = difference(runs, task, arm, other, score)
                cells.append("–" if d is None else f"{d.value:+.2f} ({d.low:+.2f} … {d.high:+.2f})")
            rows.append(cells)
    return table(("task", "difference", *SCORES, *COUNTS), rows)


def level_table(runs: Runs, task: str, arms: Sequence[str]) -> str:
    """Where each arm ends: means over the seeds that ran; of the primary outcome the deviation over seeds."""
    rows = []
    for arm in arms:
        of_arm = list(runs.get((task, arm), {}).values())
        if not of_arm:
            rows.append([ARMS[arm].title, "0", *["–"] * (len(SCORES) + len(COUNTS) + 4)])
            continue
        scores = [np.array([score(record).mean() for record in of_arm]) for score in SCORES.values()]
        cells = [f"{100 * found.mean():.1f}" for found in scores]
        if len(of_arm) > 1:
            cells[-1] += f" ± {100 * scores[-1].std(ddof=1):.1f}"
        cells += [f"{np.mean([score(r).mean() for r in of_arm]):.2f}" for score in COUNTS.values()]
        cells.append(f"{np.mean([r['entropy'] for r in of_arm]):.3f}")
        for name in ("zero_variance", "paths", "cosine"):
            known = [r["train"][name] for r in of_arm if r["train"][name] is not None]
            cells.append(f"{np.mean(known):.3f}" if known else "–")
        rows.append([ARMS[arm].title, str(len(of_arm)), *cells])
    head = ("arm", "seeds", *SCORES, *COUNTS, "entropy", "groups without variance", "paths a group", "cosine")
    return table(head, rows)


def control(runs: Runs) -> list[tuple[str, Difference | None]]:
    """The positive control on the task with synonyms: what mixing does to the number of distinct paths.

    Of base models, whose samples differ in the mixing alone, and of the training rollouts' groups.
    """
    task = plan.CORE_TASKS[0]

    def of_groups(record: Record) -> np.ndarray:
        return np.array([record["train"]["paths"]])

    return [
        (
            "distinct paths of 64 samples, base model mixed − not mixed",
            difference(runs, task, "base_ngrpo", "base", COUNTS["paths"]),
        ),
        (
            "distinct correct paths of 64 samples, base model mixed − not mixed",
            difference(runs, task, "base_ngrpo", "base", COUNTS["correct paths"]),
        ),
        (
            "distinct paths of 64 samples, base model mixed − anchor written (k 1)",
            difference(runs, task, "base_ngrpo", "base_k1", COUNTS["paths"]),
        ),
        (
            "distinct paths of 64 samples, base model mixed − random rows",
            difference(runs, task, "base_ngrpo", "base_random", COUNTS["paths"]),
        ),
        (
            "distinct paths of a group of 8 in training, N-GRPO − GRPO",
            difference(runs, task, "ngrpo", "grpo", of_groups),
        ),
        (
            "distinct paths of a group of 8 in training, N-GRPO − anchor written (k 1)",
            difference(runs, task, "ngrpo", "k1", of_groups),
        ),
    ]


def control_table(runs: Runs) -> str:
    """The positive control with t intervals over seeds."""
    rows = []
    for name, d in control(runs):
        cells = ["0", "–", "–"]
        if d is not None:
            cells = [str(d.seeds), f"{d.value:+.3f}", f"{d.low:+.3f} … {d.high:+.3f}"]
        rows.append([name, *cells])
    return table(("difference", "seeds", "mean", "t interval"), rows)


def synonyms_table(runs: Runs) -> str:
    """What is mixed on each task with words: the synonyms' share of the weight that is not the anchor's."""
    rows = []
    for name in (name for name in TASKS if name.startswith("synonyms")):
        for arm in ("ngrpo", "base_ngrpo"):
            of_arm = list(runs.get((name, arm), {}).values())
            shares = [r["train"]["synonyms"] if ARMS[arm].trains else r.get("synonyms") for r in of_arm]
            known = [share for share in shares if share is not None]
            if known:
                low, high = 100 * min(known), 100 * max(known)
                share = f"{100 * np.mean(known):.1f} % ({low:.1f} … {high:.1f})"
                rows.append([name, ARMS[arm].title, str(len(known)), share])
    return table(("task", "arm", "seeds", "synonyms' share of the other candidates' weight (range)"), rows)


def other_table(runs: Runs) -> str:
    """The other trained arms against GRPO and N-GRPO of the same seeds: t intervals, not adjusted."""
    rows = []
    for task in TASKS:
        for arm in ARMS:
            if arm in CORE or not ARMS[arm].trains or (task, arm) not in runs:
                continue
            cells = [task, ARMS[arm].title, str(len(runs[task, arm]))]
            for other in ("grpo", "ngrpo"):
                for score in ("Mean@64", PRIMARY):
                    cells.append(_points_with_interval(difference(runs, task, arm, other, SCORES[score])))
            rows.append(cells)
    against = [f"{score} − {other}" for other in ("GRPO's", "N-GRPO's") for score in ("Mean@64", PRIMARY)]
    return table(("task", "arm", "seeds", *against), rows) if rows else "None has run."


def claims_table(runs: Runs, comparisons: Sequence[Comparison]) -> str:
    """What the paper says, and what the records say of it."""
    claim = [one for one in comparisons if one.other == "grpo"]
    near = [one for one in comparisons if one.other == "random"]
    written = [one for one in comparisons if one.other == "k1"]
    mean = [
        f"on {task} {_points_with_interval(difference(runs, task, 'ngrpo', 'grpo', SCORES['Mean@64']))}"
        for task in plan.CORE_TASKS
    ]
    more = control(runs)[0][1]
    explored = "not run" if more is None else f"{more.value:+.2f} ({more.low:+.2f} … {more.high:+.2f})"
    rows = [
        (
            "N-GRPO raises Pass@32 over GRPO (by 1.8 points on average at 1.5B parameters)",
            "; ".join(map(_claim, claim)),
        ),
        ("It raises Mean@n a little (by 0.5 points)", "; ".join(mean)),
        (
            "Mixing widens exploration",
            f"distinct paths of 64 samples of a base model on synonyms, mixed − not mixed: {explored}",
        ),
        (
            "What matters is that neighbours are near in meaning",
            "against random rows: " + "; ".join(map(_claim, near)),
        ),
        (
            "(not asked by the paper) The mixture does more than writing the most likely token",
            "against k 1: " + "; ".join(map(_claim, written)),
        ),
    ]
    return table(("claim", "here"), rows)


def _points_with_interval(d: Difference | None) -> str:
    return "–" if d is None else f"{points(d.value)} ({interval(d.low, d.high)})"


def answer(runs: Runs, comparisons: Sequence[Comparison]) -> str:
    """The page's first sentences: the positive control, the claim on each task, nearness."""
    d = control(runs)[0][1]
    if d is None:
        first = "The positive control has not run yet."
    else:
        side = "more" if d.low > 0 else "fewer" if d.high < 0 else "neither more nor fewer"
        first = (
            f"With neighbours that are the anchor's true synonyms, mixed rollouts have {side} distinct "
            f"solution paths than unmixed ones ({d.value:+.2f} of 64 samples, 95 % interval {d.low:+.2f} … "
            f"{d.high:+.2f}, {d.seeds} seeds)."
        )
    claims = [_claim(one) for one in comparisons if one.other == "grpo"]
    near = [_claim(one) for one in comparisons if one.other == "random"]
    return (
        f"{first} **N-GRPO against GRPO**, held-out {PRIMARY} at equal generated tokens: "
        f"{'; '.join(claims)}. **True neighbours against random rows** with the same weights: "
        f"{'; '.join(near)}."
    )


def _claim(one: Comparison) -> str:
    d = one.difference
    if d is None:
        return f"on {one.task} not run"
    found = f"{points(d.value)} points ({interval(d.low, d.high)}, {d.seeds} seeds)"
    return f"on {one.task} {found}: **{one.verdict}**"


def power_table(runs: Runs) -> str:
    """The deviation over seeds of the claim's difference, and what the planned seeds can see."""
    rows = []
    for task in plan.CORE_TASKS:
        d = difference(runs, task, "ngrpo", "grpo", SCORES[PRIMARY])
        if d is not None:
            seen = [
                f"{100 * analysis.detectable(d.deviation, n):.1f}" for n in (d.seeds, len(plan.CORE_SEEDS))
            ]
            rows.append([task, str(d.seeds), f"{100 * d.deviation:.2f}", *seen])
    head = ("task", "seeds", "deviation", "seen by these seeds", f"seen by {len(plan.CORE_SEEDS)} seeds")
    return table(head, rows)


def cost_table(records: Sequence[Record]) -> str:
    """Runs and seconds of each task, by the records."""
    rows = []
    for task in TASKS:
        of_task = [record for record in records if record["task"] == task]
        if of_task:
            wall = [record["seconds"] for record in of_task]
            cpu = [record["cpu_seconds"] for record in of_task]
            hours = [f"{np.sum(x) / 3600:.2f}" for x in (wall, cpu)]
            rows.append([task, str(len(of_task)), f"{np.median(wall):.0f}", f"{np.median(cpu):.0f}", *hours])
    head = ("task", "runs", "seconds a run", "CPU seconds a run", "hours", "CPU hours")
    return table(head, rows)


def missing_list(runs: Runs) -> str:
    """What the plan counts and has not run, by task and arm."""
    lines = []
    for task, arm in dict.fromkeys(key[:2] for key in plan.runs()):
        wanted = {seed for name, other, seed in plan.runs() if (name, other) == (task, arm)}
        left = sorted(wanted - runs.get((task, arm), {}).keys())
        if left:
            lines.append(f"- {task}, {ARMS[arm].title}: seeds {_ranges(left)}")
    return "\n".join(lines) or "Every run of the plan was made."


def _ranges(numbers: Sequence[int]) -> str:
    """Rising whole numbers in short: 0, 3-5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def plot(comparisons: Sequence[Comparison]) -> str:
    """The primary family as SVG: a point and its t interval for each difference; ±1 point is shaded."""
    ran = [(one, one.difference) for one in comparisons if one.difference is not None]
    edge = 1.1 * max([2.0, *(100 * abs(end) for _, d in ran for end in (d.low, d.high))])
    left, width, line = 330, 400, 34
    height = line * (len(ran) + 2)

    def x(value: float) -> float:
        return round(left + width * (value + edge) / (2 * edge), 1)

    band = (
        f'<rect x="{x(-1)}" y="10" width="{round(x(1) - x(-1), 1)}" height="{height - 44}" fill="#e8eef7"/>'
    )
    zero = f'<line x1="{x(0)}" y1="10" x2="{x(0)}" y2="{height - 34}" stroke="#888"/>'
    parts = [band, zero]
    for row, (one, d) in enumerate(ran):
        y = 30 + line * row
        low, value, high = (x(100 * z) for z in (d.low, d.value, d.high))
        parts += [
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{one.task}: {one.arm} − {one.other}</text>',
            f'<line x1="{low}" y1="{y}" x2="{high}" y2="{y}" stroke="#1f5fa8" stroke-width="2"/>',
            f'<circle cx="{value}" cy="{y}" r="4" fill="#1f5fa8"/>',
            f'<text x="{left + width + 10}" y="{y + 4}">{one.verdict}</text>',
        ]
    ticks = [tick for tick in range(-20, 21) if abs(tick) <= edge and (edge < 6 or tick % 5 == 0)]
    parts += [f'<text x="{x(t)}" y="{height - 18}" text-anchor="middle">{t:+d}</text>' for t in ticks]
    parts.append(
        f'<text x="{left + width / 2}" y="{height - 2}" text-anchor="middle">points of {PRIMARY}, 95 % '
        "t interval over seeds; shaded: ±1 point</text>"
    )
    style = 'font-family="sans-serif" font-size="13"'
    size = f'viewBox="0 0 860 {height}" width="860" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def case_list(cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Single responses that one mixed step turned, by task."""
    lines = []
    for task, found in cases.items():
        lines.append(f"{task}:\n")
        for number, case in enumerate(found, 1):
            mixture = " + ".join(f"{weight:.2f} {word}" for word, weight in case["mixture"])
            lines += [
                f"{number}. *{case['problem']}*, turned **{case['turned']}** at word {case['word']}, fed "
                f"{mixture}",
                f"    - not mixed: {case['plain']}",
                f"    - mixed: {case['mixed']}",
            ]
        lines.append("")
    return "\n".join(lines).rstrip() or "None has been looked for yet."


def page(records: Sequence[Record], cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """docs/study.md."""
    runs = by_arm(records)
    comparisons = primary(runs)
    others = [arm for arm in ARMS if arm not in CORE]
    places = {
        "answer": answer(runs, comparisons),
        "primary": primary_table(runs, comparisons),
        "secondary": secondary_table(runs),
        "control": control_table(runs),
        "synonyms": synonyms_table(runs),
        **{f"levels_{task}": level_table(runs, task, ("base", *CORE)) for task in plan.CORE_TASKS},
        "others": "\n\n".join(
            f"{task}:\n\n{level_table(runs, task, [arm for arm in others if (task, arm) in runs])}"
            for task in TASKS
            if any((task, arm) in runs for arm in others)
        ),
        "other_differences": other_table(runs),
        "claims": claims_table(runs, comparisons),
        "power": power_table(runs),
        "costs": cost_table(records),
        "cases": case_list(cases),
        "missing": missing_list(runs),
    }
    text = pathlib.Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    for name, found in places.items():
        text = text.replace(f"{{{name}}}", found)
    return text


def write(folder: pathlib.Path = store.RESULTS) -> None:
    """Writes the page and its plot."""
    records = store.read(folder)
    PAGE.write_text(page(records, store.read_cases(folder)), encoding="utf-8")
    PLOT.write_text(plot(primary(by_arm(records))), encoding="utf-8")
    print(f"{PAGE} and {PLOT}, from {len(records)} runs")
