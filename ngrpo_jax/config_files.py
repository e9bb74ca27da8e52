"""Config files: found by path or by the name of a shipped one, run, and read again from a run's config.json.

Must not know flags, nor which settings there are but by `Settings`.
"""

import contextlib
import inspect
import pathlib
import runpy
import sys
from collections.abc import Iterator
from typing import Any

from ngrpo_jax import files
from ngrpo_jax.errors import UserError, require
from ngrpo_jax.former_settings import REMOVED, RENAMED, former_in

_PACKAGE = pathlib.Path(__file__).parent
# In a clone configs/ is beside the package, in an installed wheel inside of it.
SHIPPED = next((p for p in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if p.is_dir()), _PACKAGE)
_NAMES_A_FILE = "chat_template"  # the setting of section data that may name a file beside its config


def find(name: str) -> tuple[pathlib.Path, str | None]:
    """(file, argument) of a `--config`: a path or the name of a shipped config, perhaps with `:argument`.

    UserError where there is no such file.
    """
    before, colon, argument = name.rpartition(":")
    for text, given in ((name, None), (before, argument)) if colon else ((name, None),):
        for path in (pathlib.Path(text), SHIPPED / f"{text}.py"):
            if path.is_file():
                return path, given
    shipped = sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.py"))
    near = ", ".join(one for one in shipped if one != "base")
    raise UserError(f"the config {name!r} does not exist; give a path, or one of {near}.")


def load_config(name: str) -> Any:
    """The ConfigDict that a config makes; `name` as of `find`. UserError where it cannot be loaded."""
    path, argument = find(name)
    try:
        with _importable(SHIPPED.parent):
            defined = runpy.run_path(str(path))
        require("get_config" in defined, "it defines no get_config().")
        make = defined["get_config"]
        takes = bool(inspect.signature(make).parameters)
        require(takes or argument is None, f"its get_config() takes no argument, such as {argument!r}.")
        return _with_files(make(argument) if argument is not None else make(), path)
    except Exception as error:  # a config is the user's own code, so that any exception is the user's to mend
        text = path.read_text(encoding="utf-8", errors="replace")
        raised = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"the config {path} cannot be loaded: {former_in(text) or raised}") from error


def config_of_run(workdir: pathlib.Path) -> Any:
    """The ConfigDict of a run, from the config.json of its workdir; UserError where there is none."""
    from ngrpo_jax.schema import as_config_dict, flatten  # here alone: settings import jax
    from ngrpo_jax.settings import Settings

    path = workdir / "config.json"
    require(
        path.is_file(),
        f"--config=configs/NAME.py is missing, and {workdir} has no config.json of a run that would say its "
        "settings; configs/tiny.py is a good first config.",
    )
    config, kinds = as_config_dict(Settings()), Settings.kinds()
    for name, value in flatten(files.read_json(path, "remove it, and give --config")).items():
        today = RENAMED.get(name, name)
        require(today in kinds or today in REMOVED, f"{path} has an unknown setting, {name}; give --config.")
        if today in kinds:
            put(config, today, tuple(value) if isinstance(value, list) else value)
    return config


def put(config: Any, name: str, value: Any) -> None:
    """Sets SECTION.NAME, or a setting without a section, of a ConfigDict."""
    section, _, leaf = name.rpartition(".")
    (config[section] if section else config)[leaf] = value


def _with_files(config: Any, path: pathlib.Path) -> Any:
    """A file that the config names, and that is not there from the working directory, beside the config."""
    data: Any = config.get("data") if hasattr(config, "get") else None
    named = None if data is None else data.get(_NAMES_A_FILE)
    if named and not pathlib.Path(named).is_file():
        for beside in (path.parent / named, path.parent / pathlib.Path(named).name):
            if beside.is_file():
                data[_NAMES_A_FILE] = str(beside)
                break
    return config


@contextlib.contextmanager
def _importable(folder: pathlib.Path) -> Iterator[None]:
    """Lets a config write `from configs import base`, wherever the command runs."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
