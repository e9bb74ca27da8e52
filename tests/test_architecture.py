"""The map of docs/architecture.md, read from the imports: who may know whom."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "ngrpo_jax"
PARTS = {
    "algo",
    "model",
    "schema",
    "settings",
    "former_settings",
    "errors",
    "choices",
    "files",
    "rollout",
    "learner",
    "tasks",
    "runtime",
}
MAY_IMPORT = {
    "algo": set(),
    "errors": set(),
    "choices": set(),
    "files": {"errors"},
    "former_settings": set(),
    "schema": {"errors"},
    "settings": {"algo", "errors", "choices", "schema", "former_settings", "runtime.loggers"},
    "library": PARTS,
    "settings_text": {"settings", "schema"},
    "config_files": {"settings", "schema", "former_settings", "errors", "files"},
    "model": {"algo", "errors", "choices", "files"},
    "rollout": {"algo", "model", "settings", "errors", "choices"},
    "learner": {"algo", "model", "settings", "errors", "choices", "rollout.trajectory"},
    "tasks": {"settings", "errors", "choices", "rollout.trajectory", "files"},
    "runtime": {"settings", "errors", "choices", "files"},
    "setup": PARTS,
    "evaluation": PARTS | {"setup"},
    "preflight": PARTS | {"setup"},
    "run": PARTS | {"setup", "evaluation", "preflight"},
    "analysis": {"evaluation.statistics"},
}
COMMANDS = {"train", "evaluate", "export", "grade", "sweep", "report", "flags", "__init__"}
FLAX_MODULES = ("flax.linen", "flax.nnx")


def _modules():
    return sorted(ROOT.rglob("*.py"))


def _name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _imports(path):
    """Dotted names of everything that a file imports; relative imports made absolute."""
    here = ["ngrpo_jax", *_name(path).split(".")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = here[: -node.level] + base
            yield from (".".join([*base, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_imports_follow_the_map(path):
    room = _name(path).split(".")[0]
    if room in COMMANDS:
        return
    assert room in MAY_IMPORT, f"{path} is in no room of docs/architecture.md"
    for target in _imports(path):
        if not target.startswith("ngrpo_jax."):
            continue
        inner = target.removeprefix("ngrpo_jax.")
        allowed = MAY_IMPORT[room] | {room}
        fits = any(inner == a or inner.startswith(a + ".") for a in allowed)
        assert fits, f"{room} may not import {target}"


def test_every_file_stands_on_the_map():
    """Under its room, so that a name which two rooms have counts once for each."""
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.split(r"^  (?=\S)", page.split("```")[1], flags=re.MULTILINE)
    lines = {text.split("/")[0]: text for text in rooms}
    for path in _modules():
        room, *below = path.relative_to(ROOT).parts
        if path.name != "__init__.py":
            named = re.findall(r"\w+\.py", lines.get(room, "") if below else "".join(rooms))
            assert path.name in named, f"{path.relative_to(ROOT)} is missing from docs/architecture.md"


def test_the_way_of_a_prompt_is_at_most_a_dozen_files():
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d+\. `(\S+)`: ", page, flags=re.MULTILINE)
    assert 1 < len(steps) <= 12 and len(set(steps)) == len(steps)
    assert all((ROOT / step).is_file() for step in steps)


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_only_the_model_knows_flax_modules(path):
    if _name(path).startswith("model."):
        return
    for target in _imports(path):
        assert not target.startswith(FLAX_MODULES), f"{path.name} imports {target}; Flax stays in model/"


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_no_torch_and_no_tensorflow(path):
    for target in _imports(path):
        assert target.split(".")[0] not in ("torch", "tensorflow"), f"{path.name} imports {target}"
