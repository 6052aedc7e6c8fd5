"""Exact comparisons of column values with given values, and with each other.

A whole number beyond 2 ** 53 may have no float64, so numbers of two kinds are never converted to one kind. A whole
number is compared with the whole numbers next to a decimal one. A decimal literal is exact against a column of whole
numbers, and is the nearest float64 against a column of float64, as in Python. Every function returns null where a value
is null.
"""

import decimal
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

MAX_INT64 = 2**63

Truths: TypeAlias = pa.ChunkedArray  # true, false or null for each row

_COMPARE = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
SIGNS = {"=": "=", "==": "=", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
TURNED = {"=": "=", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def _up_to(largest: str) -> str:
    """A pattern for the numbers with as many digits as `largest` that are not larger."""
    below = [
        f"{largest[:at]}[0-{int(digit) - 1}]\\d{{{len(largest) - at - 1}}}"
        for at, digit in enumerate(largest)
        if digit > "0"
    ]
    return "|".join([*below, largest])


_INT64 = rf"^(?:-?\d{{1,18}}|{_up_to(str(MAX_INT64 - 1))}|-(?:{_up_to(str(MAX_INT64))}))$"
_FLOAT64 = r"^(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|-?inf)$"


@dataclass(frozen=True)
class Number:
    """A number as written: exactly, and as the nearest float64. `whole` means: without a point and an exponent."""

    exact: Decimal
    nearest: float
    whole: bool

    @classmethod
    def read(cls, text: str) -> "Number":
        """The number that a text spells, of any length and exponent."""
        nearest = float(text)
        try:
            exact = Decimal(text)
        except decimal.InvalidOperation:  # the exponent has 19 digits or more
            mantissa, _, exponent = text.lower().partition("e")
            least = Decimal("-1e-9999" if mantissa.startswith("-") else "1e-9999")
            exact = Decimal(0) if not Decimal(mantissa) else least if exponent.startswith("-") else Decimal(nearest)
        return cls(exact, nearest, re.fullmatch(r"[-+]?\d+", text) is not None)


@dataclass(frozen=True)
class Numbers:
    """A column of numbers of two kinds: each is int64 in `whole` or float64 in `decimal`, and null in the other."""

    whole: pa.ChunkedArray
    decimal: pa.ChunkedArray

    @classmethod
    def of_texts(cls, texts: pa.ChunkedArray) -> "Numbers":
        """Numbers from texts, as files with both kinds store them. A text that spells no number becomes null."""
        # pyarrow writes a float64 of 16 digits or more with an exponent. So only an int64 has so many digits.
        is_whole = pc.match_substring_regex(texts, _INT64)
        nothing = pa.scalar(None, pa.string())
        spelt = pc.match_substring_regex(texts, _FLOAT64)
        wholes, others = pc.if_else(is_whole, texts, nothing), pc.if_else(is_whole, nothing, texts)
        return cls(wholes.cast(pa.int64()), pc.if_else(spelt, others, nothing).cast(pa.float64()))

    def slice(self, start: int, length: int) -> "Numbers":
        return Numbers(self.whole.slice(start, length), self.decimal.slice(start, length))


Values: TypeAlias = pa.ChunkedArray | Numbers


def is_valid(values: Values) -> Truths:
    """Which values are not null."""
    if isinstance(values, Numbers):
        return pc.or_(pc.is_valid(values.whole), pc.is_valid(values.decimal))
    return pc.is_valid(values)


def compare(values: Values, sign: str, other: pa.Scalar | Number) -> Truths:
    """Compare each value with one value: of the same kind, or any number if the values are numbers."""
    if isinstance(values, Numbers):
        return pc.coalesce(compare(values.whole, sign, other), compare(values.decimal, sign, other))
    if not isinstance(other, Number):
        return _COMPARE[sign](values, other)
    if pa.types.is_integer(values.type):
        return _whole_against(values, sign, other.exact)
    return _decimal_against(values, sign, other)


def compare_columns(left: Values, sign: str, right: Values) -> Truths:
    """Compare each value with that of another column. The columns have the same kind, or both hold numbers."""
    if isinstance(left, Numbers):
        parts = [compare_columns(part, sign, right) for part in (left.whole, left.decimal)]
        return pc.coalesce(*parts)
    if isinstance(right, Numbers):
        return compare_columns(right, TURNED[sign], left)
    if pa.types.is_integer(left.type) and pa.types.is_floating(right.type):
        return _whole_with_decimal(left, sign, right)
    if pa.types.is_floating(left.type) and pa.types.is_integer(right.type):
        return _whole_with_decimal(right, TURNED[sign], left)
    return _COMPARE[sign](left, right)


def inside(kind: pa.DataType, others: Sequence[pa.Scalar | Number]) -> Callable[[Values], Truths]:
    """Returns a function that tests whether each value is one of `others`. The lookup sets are built once."""
    if not all(isinstance(other, Number) for other in others):
        given = pa.array([other.as_py() for other in others if isinstance(other, pa.Scalar)], kind)
        return lambda values: _where_valid(values, pc.is_in(values, value_set=given))
    numbers = [other for other in others if isinstance(other, Number)]
    within = [number.exact for number in numbers if -MAX_INT64 <= number.exact < MAX_INT64]
    wholes = {int(exact) for exact in within if exact == exact.to_integral_value()}
    decimals = {_exactly(number) for number in numbers} - {None}
    signed = [*decimals, *((0.0, -0.0) if 0.0 in decimals else ())]  # equal, but different in a lookup
    int64s, float64s = pa.array(sorted(wholes), pa.int64()), pa.array(signed, pa.float64())

    def found(values: Values) -> Truths:
        if isinstance(values, Numbers):
            return pc.coalesce(found(values.whole), found(values.decimal))
        given = int64s if pa.types.is_integer(values.type) else float64s
        return _where_valid(values, pc.is_in(values, value_set=given))

    return found


def _exactly(number: Number) -> float | None:
    """The float64 that a value must have to equal a number; None if no float64 equals it."""
    if not number.whole:
        return number.nearest
    return number.nearest if math.isfinite(number.nearest) and Decimal(number.nearest) == number.exact else None


def _where_valid(values: pa.ChunkedArray, truths: Truths | bool) -> Truths:
    truths = pa.scalar(truths) if isinstance(truths, bool) else truths
    return pc.if_else(pc.is_valid(values), truths, pa.scalar(None, pa.bool_()))


def _whole_against(values: pa.ChunkedArray, sign: str, exact: Decimal) -> Truths:
    """Compare int64 with any number, through the whole numbers next to it."""
    if not -MAX_INT64 <= exact < MAX_INT64:
        return _where_valid(values, sign == "!=" or (sign in ("<", "<=") if exact > 0 else sign in (">", ">=")))
    below, above = math.floor(exact), math.ceil(exact)
    if sign in ("=", "!="):
        return _where_valid(values, sign == "!=") if below != above else _COMPARE[sign](values, pa.scalar(below))
    if sign in ("<=", ">"):
        return _COMPARE[sign](values, pa.scalar(below, pa.int64()))
    if above == MAX_INT64:
        return _where_valid(values, sign == "<")
    return _COMPARE[sign](values, pa.scalar(above, pa.int64()))


def _decimal_against(values: pa.ChunkedArray, sign: str, number: Number) -> Truths:
    """Compare float64 with any number. No float64 lies between a whole number and the float64 nearest to it."""
    nearest = number.nearest
    if _exactly(number) is not None:
        return _COMPARE[sign](values, pa.scalar(nearest))
    if sign in ("=", "!="):
        return _where_valid(values, sign == "!=")
    is_above = nearest > number.exact  # true for +inf, false for -inf
    if sign in ("<", "<="):
        return _COMPARE["<" if is_above else "<="](values, pa.scalar(nearest))
    return _COMPARE[">=" if is_above else ">"](values, pa.scalar(nearest))


def _whole_with_decimal(wholes: pa.ChunkedArray, sign: str, decimals: pa.ChunkedArray) -> Truths:
    """Compare int64 with float64 row by row, through the whole numbers next to the decimal ones."""
    if sign == "!=":
        return pc.invert(_whole_with_decimal(wholes, "=", decimals))
    if sign in (">", ">="):
        return pc.invert(_whole_with_decimal(wholes, {">": "<=", ">=": "<"}[sign], decimals))
    next_to = pc.ceil(decimals) if sign == "<" else pc.floor(decimals)
    too_large = pc.greater_equal(next_to, pa.scalar(float(MAX_INT64)))
    too_small = pc.less(next_to, pa.scalar(float(-MAX_INT64)))
    outside = pc.or_(too_large, too_small)
    int64s = pc.if_else(outside, pa.scalar(0.0), next_to).cast(pa.int64())
    found = _COMPARE[sign](wholes, int64s)
    if sign == "=":
        alike = pc.and_(pc.equal(next_to, decimals), pc.invert(outside))
        truths = pc.and_kleene(found, alike)
    else:
        truths = pc.if_else(outside, too_large, found)
    return pc.if_else(pc.and_(pc.is_valid(wholes), pc.is_valid(decimals)), truths, pa.scalar(None, pa.bool_()))
