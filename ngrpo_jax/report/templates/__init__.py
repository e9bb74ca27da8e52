"""The HTML of the report: templates beside this file. Values are escaped unless they are Markup.

Owns the templates and the style sheet. Must not know what a page shows.
"""

import functools
import importlib.resources
import json
import re
from typing import Any

import jinja2
from markupsafe import Markup


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader(__name__, "")
    found = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_readable
    )
    found.filters["embedded"] = embedded
    found.globals["file"] = _file
    found.filters["anchor"] = lambda title: "".join(c if c.isalnum() else "-" for c in title.lower())
    return found


def fill(name: str, **values: Any) -> str:
    """The page that the template `name` makes of these values."""
    page = _environment().get_template(name).render(values)
    return page.encode("utf-8", "replace").decode()  # half of a surrogate pair has no UTF-8


def embedded(value: Any) -> Markup:
    """JSON to stand in a script element: no text of it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _file(name: str) -> Markup:
    """A style sheet or script beside this file, as it is: a template would read its braces."""
    return Markup(importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))


def _readable(value: Any) -> Any:
    """Text as a page shows it: signs for control characters and for marks that turn the direction of writing.

    A per cent sign stays on the line of its number.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _INVISIBLE.sub(_sign, value).replace(" %", "\u00a0%")


def _sign(found: re.Match[str]) -> str:
    return f"⟨U+{ord(found[0]):04X}⟩"


_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
