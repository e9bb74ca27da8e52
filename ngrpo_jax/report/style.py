"""The frame of a page of the report: HTML head and style sheet, for phones and for wide screens.

Owns the style sheet (style.css) and the head. Must not know what a page shows.
"""

import pathlib
from html import escape

CSS = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


def document(title: str, body: str) -> str:
    """A whole HTML document; `title` is escaped, `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · N-GRPO</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
