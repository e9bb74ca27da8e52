"""The environment variables that have to be right before jax is imported.

Owns what may be said in them, not who says it: the scripts of launch/ set them.
"""

import os
import pathlib
from collections.abc import Mapping

from ngrpo_jax.errors import UserError
from ngrpo_jax.runtime import distributed

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
CACHE = "JAX_COMPILATION_CACHE_DIR"
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def check(variables: Mapping[str, str]) -> tuple[Mapping[str, str], str]:
    """Returns the variables, and a remark on those that only make a run slower or its log late.

    Raises:
        ValueError: one that jax would misread, or refuse late and without its name.
    """
    distributed.explicit(variables)
    for name in FLAGS:
        wrong = [word for word in variables.get(name, "").split() if not word.startswith("-")]
        if wrong:
            raise UserError(f"{name} has {wrong[0]!r}, which is no flag; each begins with --.")
    fraction = variables.get(FRACTION)
    if fraction is not None and not _is_share(fraction):
        raise UserError(f"{FRACTION} is {fraction!r}; it must be a share of memory between 0 and 1.")
    for name in filter(None, variables.get("JAX_PLATFORMS", "").split(",")):
        if name not in PLATFORMS:
            raise UserError(f"JAX_PLATFORMS has {name!r}; it may hold {', '.join(PLATFORMS)}.")
    cache = variables.get(CACHE)
    if cache and "://" not in cache:
        _check_cache(pathlib.Path(cache))
    remarks = [] if cache else [f"{CACHE} is not set: every start compiles anew"]
    if not variables.get("PYTHONUNBUFFERED"):
        remarks.append("PYTHONUNBUFFERED is not set: a log file lags behind")
    return variables, "; ".join(remarks) or "complete"


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def _check_cache(folder: pathlib.Path) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{CACHE} is {folder}, which cannot be written; name a folder that can.")
