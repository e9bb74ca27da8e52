"""Which settings may change when a run is resumed, and what the settings of an older checkpoint mean today.

Settings are plain values here, by dotted name, as JSON gives them back. Must not know arrays or checkpoints.
"""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from ngrpo_jax.errors import require
from ngrpo_jax.files import as_json
from ngrpo_jax.former_settings import REMOVED, RENAMED, RENAMED_VALUES
from ngrpo_jax.settings import Settings


def best_key(settings: Settings) -> str:
    """The metric of a step's row that makes its checkpoint the best."""
    return f"eval/{settings.checkpoint.best_metric}"


# What --allow-changes names besides settings: the weights that a run starts from; how prompts become tokens.
MODEL, TOKENIZER = "model", "tokenizer"


def allowed_changes(names: str | None) -> frozenset[str]:
    """What --allow-changes=NAME,… allows; UserError for a name of nothing that it could."""
    found = frozenset(filter(None, (names or "").split(",")))
    unknown = sorted(found - {*Settings.kinds(), MODEL, TOKENIZER})
    require(
        not unknown,
        f"--allow-changes names {', '.join(unknown)}; it takes names of settings, {MODEL} and {TOKENIZER}.",
    )
    return found


def check_resumable(
    host: dict[str, Any],
    step: int,
    settings: Settings,
    workdir: pathlib.Path,
    allowed: Collection[str] = (),
) -> None:
    """UserError where a checkpoint is of a run with other settings, or beyond the last step of this one."""
    here = {name: value for name, value in lasting_settings(settings).items() if name not in allowed}
    # The first versions let model.dtype change and did not store it: its default says nothing of such a run.
    stored = {"model.dtype": settings.model.dtype, **host["settings"]}
    stored = {name: value for name, value in stored.items() if name not in allowed}
    changed, steps = "; ".join(changes(stored, here)), settings.train.steps
    require(
        not changed,
        f"the run in {workdir} was made with {changed}; use those, another --workdir, or --allow-changes.",
    )
    sentence = f"the run in {workdir} is at step {step} already; raise train.steps, which is {steps}."
    require(step <= steps, sentence)


def lasting_settings(settings: Settings) -> dict[str, Any]:
    """The settings that may not change between the parts of a run."""
    kinds, leaves = settings.kinds(), as_json(settings.leaves())
    return {name: value for name, value in leaves.items() if not kinds[name].may_change}


def changes(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How stored settings differ from today's, one phrase for each setting.

    Args:
      stored: written by this version or an earlier one. A setting that is missing did not exist yet, and has
        its default. A removed one must have its last default, which is what every run does today.
      here: the settings to compare with.
    """
    defaults = as_json(Settings().leaves())
    renamed = {RENAMED.get(name, name): value for name, value in stored.items()}
    there = {name: _today(name, value) for name, value in renamed.items()}
    lost = [
        f"{name} {value}, which is no setting of this version"
        for name, value in there.items()
        if name not in defaults and (name not in REMOVED or value != REMOVED[name][0])
    ]
    was = {name: there.get(name, defaults[name]) for name in here}
    return lost + [f"{name} {was[name]}, not {value}" for name, value in here.items() if was[name] != value]


def _today(name: str, value: Any) -> Any:
    return value if isinstance(value, list) else RENAMED_VALUES.get((name, value), value)
