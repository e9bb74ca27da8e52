"""The HTML of the report: templates beside this file. Values are escaped unless they are Markup.

Owns the templates and the style sheet. Must not know what a page shows.
"""

import functools
from typing import Any

import jinja2


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader(__name__, "")
    found = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    found.filters["anchor"] = lambda title: "".join(c if c.isalnum() else "-" for c in title.lower())
    return found


def fill(name: str, **values: Any) -> str:
    """The page that the template `name` makes of these values."""
    return _environment().get_template(name).render(values)
