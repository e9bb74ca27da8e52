"""The environment variables that must be right before jax is imported.

Owns which values they may have. The scripts of launch/ set them.
"""

import pathlib
from collections.abc import Mapping

from ngrpo_jax.errors import require
from ngrpo_jax.preflight.capacity import is_writable, nearest_existing
from ngrpo_jax.runtime import distributed

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
CACHE = "JAX_COMPILATION_CACHE_DIR"
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def check(variables: Mapping[str, str]) -> tuple[Mapping[str, str], str]:
    """Returns the variables, and a remark on those whose absence makes starts slow or logs late.

    Raises:
        UserError: a value that jax would misread, or refuse late and without the variable's name.
    """
    distributed.explicit(variables)
    for name in FLAGS:
        wrong = [word for word in variables.get(name, "").split() if not word.startswith("-")]
        require(not wrong, f"{name} has {''.join(wrong[:1])!r}, which is no flag; each begins with --.")
    fraction = variables.get(FRACTION)
    require(
        fraction is None or _is_share(fraction),
        f"{FRACTION} is {fraction!r}; it must be a share of memory between 0 and 1.",
    )
    for name in filter(None, variables.get("JAX_PLATFORMS", "").split(",")):
        require(name in PLATFORMS, f"JAX_PLATFORMS has {name!r}; it may hold {', '.join(PLATFORMS)}.")
    cache = variables.get(CACHE)
    if cache and "://" not in cache:
        writable = is_writable(nearest_existing(pathlib.Path(cache)))
        require(writable, f"{CACHE} is {cache}, which cannot be written; name a folder that can.")
    remarks = [] if cache else [f"{CACHE} is not set: every start compiles anew"]
    if not variables.get("PYTHONUNBUFFERED"):
        remarks.append("PYTHONUNBUFFERED is not set: a log file lags behind")
    return variables, "; ".join(remarks) or "complete"


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
