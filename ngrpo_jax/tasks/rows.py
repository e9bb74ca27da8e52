"""The fields of a row as text.

Owns what counts as text, as a number and as an empty field. Must not know file formats or what a problem is:
`files` and TFDS give rows, `datasets` and `builders` read their fields.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ngrpo_jax.errors import UserError

Row = Mapping[str, Any]


def find(row: Row, names: Sequence[str]) -> str | None:
    """The row's spelling of the first of `names` that it has; case and punctuation do not count."""
    spelt = {plain_name(name): name for name in reversed(list(row))}
    return next((spelt[plain_name(name)] for name in names if plain_name(name) in spelt), None)


def plain_name(name: Any) -> str:
    """A column's name without case and punctuation: "Correct Answer" and correct_answer are one."""
    return re.sub(r"[\W_]+", "_", str(name)).strip("_").lower()


def field_list(row: Row) -> str:
    """The names of a row's fields, for an error's sentence."""
    return ", ".join(map(str, row)) or "none"


def is_null(value: Any) -> bool:
    """Whether a field is empty: None, NaN, or text of spaces alone."""
    value = _scalar(value)
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | bytes) and not value.strip())


def text(place: str, name: str, value: Any, *, numbers: bool = False) -> str:
    """A field's text. TFDS gives bytes, which are decoded; with `numbers`, a number becomes its decimal text.

    Raises UserError, naming the place and the field, for any other type and for empty text.
    """
    value = _scalar(value)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: field {name!r} is not UTF-8 text; convert it") from error
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} is {type(value).__name__}, not text; give it as text")
    if not value.strip():
        raise UserError(f"{place}: field {name!r} is empty; fill it in or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field {name!r} holds half a character ({error.reason}); correct it"
        ) from error
    return value


def some(items: Iterable[Any], most: int = 10) -> str:
    """The first few of `items`, and how many there are besides."""
    listed = list(map(str, items))
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def _scalar(value: Any) -> Any:
    """The Python value of a NumPy scalar."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
