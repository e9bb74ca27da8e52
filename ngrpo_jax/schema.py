"""What the declared type of a setting allows, and how a value of that type is read from text.

A setting is one field of a dataclass that derives from `Section`: name, type, default, comment. The type is
the check: `int`, `float`, `str`, `bool` and tuples of them say what kind of value it is,
`Annotated[..., Check]` which of these values are allowed, and `| None` that the setting may be unset. This
module must not know which settings there are.
"""

import ast
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

from ngrpo_jax.errors import require


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


_KINDS = {
    int: ("a whole number", lambda value: type(value) is int),
    float: ("a finite number", lambda value: type(value) in (int, float) and _finite(value)),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("text", lambda value: type(value) is str),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """Which values of a type are allowed: `must_be` ends the sentence "NAME is VALUE; it must be ...".

    A `technical` check is one of how numbers are stored, which a list of settings leaves out.
    """

    holds: Callable[[Any], bool]
    must_be: str
    technical: bool = False


def one_of(choices: Collection[str]) -> Check:
    """The check of a choice."""
    return Check(lambda value: value in choices, f"one of {', '.join(choices)}")


def each_of(choices: Collection[str]) -> Check:
    """The check of a tuple of choices."""
    return Check(lambda values: set(values) <= set(choices), f"a tuple of some of {', '.join(choices)}")


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def at_least(bound: float) -> Check:
    """Check that a number is `bound` or above."""
    return Check(lambda value: value >= bound, f"{bound} or above")


def at_most(bound: float, *, technical: bool = False) -> Check:
    """Check that a number is `bound` or below."""
    return Check(lambda value: value <= bound, f"{bound} or below", technical)


INT64 = at_most(2**63 - 1, technical=True)
_INT32 = at_most(2**31 - 1, technical=True)  # what an array on a device can count
Count = Annotated[int, Check(lambda value: value > 0, "above 0"), _INT32]
Natural = Annotated[int, at_least(0), _INT32]
Positive = Annotated[float, Check(lambda value: value > 0, "above 0")]
NonNegative = Annotated[float, at_least(0)]
Probability = Annotated[float, Check(lambda value: 0 <= value <= 1, "between 0 and 1")]
Decay = Annotated[float, Check(lambda value: 0 <= value < 1, "in [0, 1)")]


# Beside the type of a setting that changes where, how fast or how long a run goes, not what it computes.
MAY_CHANGE = "may change when a run is resumed"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A declared type taken apart: `plain` is int, float, bool or str, `several` a tuple of it."""

    plain: type
    several: bool
    optional: bool
    checks: tuple[Check, ...]
    may_change: bool = False  # when a run is resumed

    @classmethod
    def of(cls, declared: Any) -> Self:
        """The parts of a declared type."""
        origin, arguments = typing.get_origin(declared), typing.get_args(declared)
        if origin is Annotated:
            inner, marks = cls.of(arguments[0]), arguments[1:]
            checks = (*inner.checks, *(mark for mark in marks if isinstance(mark, Check)))
            return dataclasses.replace(inner, checks=checks, may_change=MAY_CHANGE in marks)
        if origin in (typing.Union, types.UnionType):
            (inner_type,) = (argument for argument in arguments if argument is not types.NoneType)
            return dataclasses.replace(cls.of(inner_type), optional=True)
        if origin is tuple:
            return dataclasses.replace(cls.of(arguments[0]), several=True)
        return cls(declared, several=False, optional=False, checks=())

    def check(self, name: str, value: Any) -> None:
        """UserError, in one sentence with the setting's name and value, unless the value is allowed."""
        if value is None:
            require(self.optional, f"{name} is None; it needs a value.")
            return
        noun, is_plain = _KINDS[self.plain]
        if self.several:
            fits, noun = isinstance(value, tuple) and all(map(is_plain, value)), f"a tuple, each {noun}"
        else:
            fits = is_plain(value)
        unset = ", or None" if self.optional else ""
        for check in (Check(lambda _: fits, noun), *self.checks):
            require(check.holds(value), f"{name} is {value!r}; it must be {check.must_be}{unset}.")

    def read(self, name: str, text: str) -> Any:
        """The value that a text of the command line stands for, checked."""
        value: Any = text
        if text == "None":
            value = None
        elif self.several:
            value = _literal(text)
            value = tuple(value) if isinstance(value, tuple | list) else (value,)
        elif self.plain is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif self.plain is not str:
            value = _literal(text)
        self.check(name, value)
        return value


def _literal(text: str) -> Any:
    """A Python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclasses.dataclass(frozen=True)
class Section:
    """Settings that belong together. Making one checks every value by its declared type, then the rules."""

    prefix: ClassVar[str]  # of the names in error sentences, such as "rollout."
    may_change: ClassVar[bool]  # whether all its settings may change when a run is resumed

    def __init_subclass__(cls, prefix: str, may_change: bool = False) -> None:
        cls.prefix, cls.may_change = prefix, may_change

    def __post_init__(self) -> None:
        for name, kind in self.kinds().items():
            if "." not in name:  # a sub-section has checked its own
                kind.check(f"{self.prefix}{name}", getattr(self, name))
        for holds, sentence in self.rules():
            require(holds, sentence)

    def rules(self) -> Iterator[tuple[bool, str]]:
        """What has to hold between settings, each with the sentence for where it does not."""
        yield from ()

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """Name -> declared type of every setting; SECTION.NAME for those of a sub-section."""
        hints = typing.get_type_hints(cls, include_extras=True)
        found: dict[str, Kind] = {}
        for name in (field.name for field in dataclasses.fields(cls)):
            if dataclasses.is_dataclass(hints[name]):
                found |= {f"{name}.{leaf}": kind for leaf, kind in hints[name].kinds().items()}
            else:
                kind = Kind.of(hints[name])
                found[name] = dataclasses.replace(kind, may_change=kind.may_change or cls.may_change)
        return found

    def leaves(self) -> dict[str, Any]:
        """Name -> value of every setting, by the names of `kinds`."""
        return flatten(dataclasses.asdict(self))

    def select(self, target: type) -> dict[str, Any]:
        """The settings whose names are fields of the dataclass `target`, as its keyword arguments."""
        names = [field.name for field in dataclasses.fields(target)]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"rollout": {"group": 4}} -> {"rollout.group": 4}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{leaf}": x for leaf, x in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def as_config_dict(section: Section) -> Any:
    """A locked ConfigDict of a section and its sub-sections. It holds each value to its declared type."""
    import ml_collections  # here alone, so that a library user needs no ConfigDict

    config, kinds = ml_collections.ConfigDict(), section.kinds()
    for name in (field.name for field in dataclasses.fields(section)):
        value = getattr(section, name)
        if isinstance(value, Section):
            config[name] = as_config_dict(value)
        elif kinds[name].optional:
            plain = tuple if kinds[name].several else kinds[name].plain
            config[name] = ml_collections.FieldReference(value, field_type=plain)
        else:
            config[name] = value
    return config.lock()
