"""Functions of the user's, imported by a path "package.module:function"."""

import importlib
from collections.abc import Callable
from typing import Any

from ngrpo_jax.errors import UserError, explained, require


def import_function(path: str, purpose: str) -> Callable[..., Any]:
    """The callable at `path`, which is written "package.module:function".

    Args:
      purpose: begins the sentence of an error, such as "the reward".
    Raises UserError where the path is malformed, the module cannot be imported, or it has no such callable.
    """
    module_name, colon, name = path.partition(":")
    fault = f"{purpose} {path!r} is no import path; write it as package.module:function"
    require(bool(module_name and colon and name), fault)
    remedy = "check its name, and that its folder is the current one or on PYTHONPATH"
    with explained(ImportError, f"{purpose} {path!r} cannot be imported", remedy):
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{purpose} {path!r}: module {module_name} has no function {name!r}")
    return function
