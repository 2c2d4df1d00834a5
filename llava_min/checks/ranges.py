"""Ranges of numbers as annotations, `lr: PositiveFloat`, of the library's options and of flags."""

import functools
import types
import typing
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple

from llava_min.errors import UserError

MAX_INT, MAX_FLOAT = 1 << 31, 1e30  # no setting is larger; said of a value that is


class Range(NamedTuple):
    low: float = -MAX_FLOAT
    high: float = MAX_FLOAT
    words: str = ""  # what is expected, where "from low to high" does not say it
    zero: bool = False  # 0 is allowed, too

    def expected(self, kind: type, value: Any = None) -> str:
        noun = {int: "an integer", float: "a number"}[kind]
        if self.words or self.low == -MAX_FLOAT:
            return self.words or noun
        if self.high in (MAX_INT, MAX_FLOAT):
            above = isinstance(value, Real) and self.high < value
            most = f" and at most {self.high:.15g}" if above else ""
            return f"{noun} of at least {self.low:g}{most}"
        return f"{noun} from {self.low:g} to {self.high:g}"


PositiveInt = Annotated[int, Range(1, MAX_INT)]
NonNegativeInt = Annotated[int, Range(0, MAX_INT)]
Seed = Annotated[int, Range(0, 2**63 - 1, "an integer from 0 to 2**63 - 1")]
PositiveFloat = Annotated[float, Range(1e-30, MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Range(0.0, MAX_FLOAT)]
Fraction = Annotated[float, Range(0.0, 1.0)]


def not_none(kind: Any) -> Any:
    """X of the annotation `X | None`; any other as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
        return kinds[0] if len(kinds) == 1 else kind
    return kind


def range_of(kind: Any) -> tuple[type, Range] | None:
    """int or float and its range; None for an annotation that is no number.

    A range is a `Range`, or its two ends: Annotated[float, 0.0, 1.0].
    """
    if kind in (int, float):
        return kind, Range()
    if typing.get_origin(kind) is Annotated and typing.get_args(kind)[0] in (int, float):
        kind, *ends = typing.get_args(kind)
        return kind, ends[0] if isinstance(ends[0], Range) else Range(*ends)
    return None


def check_number(value: Any, kind: Any, name: str) -> int | float:
    """`value` as int or float, of Python or numpy, in the range of `kind`, or UserError."""
    base, allowed = range_of(kind)
    if isinstance(value, Integral if base is int else Real) and not isinstance(value, bool):
        if allowed.low <= value <= allowed.high or allowed.zero and value == 0:
            return int(value) if isinstance(value, Integral) else float(value)
    expected = allowed.expected(base, value)
    raise UserError(f"{value!r:.40} was given, expected {expected}; correct it", name)


@functools.cache
def number_fields(config: type) -> dict[str, Any]:
    """The fields of a dataclass that are numbers, with their annotations."""
    kinds = typing.get_type_hints(config, include_extras=True)
    return {name: not_none(kind) for name, kind in kinds.items() if range_of(not_none(kind))}


def check_ranges(config: Any) -> dict[str, Any]:
    """The numbers of the dataclass instance `config`, as Python's own, or UserError."""
    checked = {}
    for name, kind in number_fields(type(config)).items():
        value = getattr(config, name)
        # None is a value where the default is None
        unset = value is None and getattr(type(config), name) is None
        checked[name] = None if unset else check_number(value, kind, name)
    return checked
