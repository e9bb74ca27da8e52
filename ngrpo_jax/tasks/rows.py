"""The fields of a row as text.

Owns what counts as text, as a number and as an empty field, and the checks of each row. Must not know file
formats: `files` and TFDS give rows, `datasets` and `builders` read them.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ngrpo_jax.errors import UserError, explained

Row = Mapping[str, Any]
MOST_CHARACTERS = 1_000_000  # of a field: far above any context, and still encoded within seconds


def plain_name(name: Any) -> str:
    """A column's name without case and punctuation: "Correct Answer" and correct_answer are one."""
    return re.sub(r"[\W_]+", "_", str(name)).strip("_").lower()


def find(row: Any, names: Sequence[str], spelling: Callable[[Any], str] = plain_name) -> str | None:
    """The row's name for the first of `names` that it has; names with the same `spelling` are one."""
    own = {spelling(name): name for name in reversed(list(row))} if isinstance(row, Mapping) else {}
    return next((own[spelling(name)] for name in names if spelling(name) in own), None)


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Reads the rows of one file or set: the texts of their fields, and ids that differ.

    Attributes:
      origin: the file or set, for the sentence of an error.
      names: for each field of a problem the names that a row may give it; the first that the row has is read.
      needed_by: what needs the fields, for the sentence of an error.
      default_id: the id of a row without one, a format of the row's number.
      source: of a file or set whose source may name its fields; the sentence of an error then says how.
      tolerant: whether rows with an empty field are left out; else such a row is an error.
      spelling: names with the same spelling are one name.
    """

    origin: str
    names: Mapping[str, Sequence[str]]
    needed_by: str
    default_id: str
    tolerant: bool
    source: str = ""
    spelling: Callable[[Any], str] = plain_name
    _numbers: dict[str, int] = dataclasses.field(default_factory=dict)  # id -> row

    def find(self, row: Any, field: str) -> str | None:
        """The row's own spelling of a field's name; None where it has no such field."""
        return find(row, self.names[field], self.spelling)

    def read(
        self, number: int, row: Any, wanted: Sequence[str] = ("problem", "answer")
    ) -> dict[str, str] | None:
        """The texts of the row's `id` and of the wanted fields; None for a row that is left out.

        Raises UserError, naming the place and the field, for a field that is missing or no text, and for the
        id of an earlier row.
        """
        place = f"{self.origin}, row {number}"
        if not isinstance(row, Mapping):
            wished = " and ".join(self.names[field][0] for field in ("problem", "answer"))
            raise UserError(f"{place}: not an object with the fields {wished}")
        found: dict[str, str] = {}
        for field in wanted:
            name = self.find(row, field)
            if name is None:
                first, *others = self.names[field]
                also = f" (or {', '.join(others)})" if others else ""
                raise UserError(
                    f"{place}: no field {first!r}{also}, which {self.needed_by} needs (fields here: "
                    f"{', '.join(map(str, row)) or 'none'}){self._how_to_name(field, row)}"
                )
            found[field] = name
        if self.tolerant and any(is_null(row[name]) for name in found.values()):
            return None
        texts = {
            field: text(place, name, row[name], numbers=field != "problem") for field, name in found.items()
        }
        own, name = self.default_id.format(number), self.find(row, "id")
        if name is not None and not is_null(row[name]):
            own = text(place, name, row[name], numbers=True)
        earlier = self._numbers.setdefault(own, number)
        if earlier != number:
            raise UserError(f"{place}: row {earlier} has the id {own!r} too; ids must differ")
        return texts | {"id": own}

    def _how_to_name(self, field: str, row: Row) -> str:
        """How the source names a field of another name; nothing where it cannot, or names it already."""
        if not self.source or self.names[field] != (field,):
            return ""
        used = {name for names in self.names.values() for name in names}
        free = [str(name) for name in row if name not in used]
        if not free:
            return ""
        joint = "&" if "?" in self.source else "?"
        return f"; name it by {self.source}{joint}{field}={free[0] if len(free) == 1 else 'FIELD'}"


def opened(place: str, row: Any, names: Iterable[str]) -> Any:
    """The row with the fields `names` at its top: A.B is field B of the object A, a chat its one user turn.

    Raises UserError, naming the place, for a chat that is not one user turn.
    """
    if not isinstance(row, Mapping):
        return row
    found = dict(row)
    for name in names:
        value: Any = row
        for part in [name] if name in row else name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Sequence) and value and all(isinstance(turn, Mapping) for turn in value):
            value = _user_turn(f"{place}: field {name!r}", value)
        if name in row or value is not None:
            found[name] = value
    return found


def _user_turn(field: str, turns: Sequence[Mapping[str, Any]]) -> Any:
    if [turn.get("role") for turn in turns] != ["user"]:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise UserError(
            f"{field} is a chat of the turns {roles}; give the one user turn, and a system turn by "
            "data.system_prompt"
        )
    return turns[0].get("content")


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
    field, value = f"{place}: field {name!r}", _scalar(value)
    if is_null(value):
        raise UserError(f"{field} is empty; fill it in or leave the row out")
    if isinstance(value, bytes):
        with explained(UnicodeDecodeError, f"{field} is not UTF-8 text", "convert it"):
            value = value.decode("utf-8")
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{field} is {type(value).__name__}, not text; give it as text")
    if len(value) > MOST_CHARACTERS:
        raise UserError(f"{field} has {len(value)} characters, above {MOST_CHARACTERS}; leave the row out")
    with explained(UnicodeEncodeError, f"{field} holds half a character", "correct it"):
        value.encode()
    return value


def some(items: Iterable[Any], most: int = 10) -> str:
    """The first few of `items`, and how many there are besides."""
    listed = list(map(str, items))
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def _scalar(value: Any) -> Any:
    """The Python value of a NumPy scalar."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
