"""Typed expressions made at random, against a plain Python evaluation: none raises, none differs."""

import datetime
import functools
import random
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest

from pipeline.index.search.comparisons import Numbers
from pipeline.index.search.filter_expression import parse

KINDS: dict[str, pa.DataType] = {
    "i": pa.int64(),
    "j": pa.int64(),
    "f": pa.float64(),
    "g": pa.float64(),
    "m": pa.float64(),  # kept as whole numbers by some, and as decimal ones by others
    "b": pa.bool_(),
    "c": pa.bool_(),
    "s": pa.string(),
    "u": pa.string(),
    "d": pa.date32(),
    "t": pa.timestamp("us"),
    "z": pa.timestamp("us", tz="UTC"),
}
EACH = 1_000
NUMBERS = "ijfgm"
INTS = [0, 1, -1, 2, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**63 - 513, 10**18,
        7_214_839_472_947_593_217]  # fmt: skip
FLOATS = [0.0, -0.0, 1.0, 1.5, -2.5, 2.0**53, 2.0**53 + 2, 2.0**63, -(2.0**63), 2.0**64, 1e300, -1e300, 5e-324, 0.1,
          float("inf"), float("-inf"), 9.223372036854774e18]  # fmt: skip
TEXTS = ["", "a", "b", "ab", "aXb", "a\nb", "it's", "100%", "a_b", "é", "日本", "a\\b", "Z", "\U0001f600", "ba" * 20]
DAYS = [datetime.date(1, 1, 1), datetime.date(1969, 12, 31), datetime.date(2024, 2, 29), datetime.date(9999, 12, 31)]
TIMES = [datetime.datetime(1, 1, 1), datetime.datetime(2024, 5, 6, 12), datetime.datetime(2024, 5, 6, 12, 0, 0, 1),
         datetime.datetime(9999, 12, 31, 23, 59, 59, 999_999)]  # fmt: skip
WHOLE = [*map(str, INTS), "9223372036854775808", "-9223372036854775809", "18446744073709551616", "9007199254740993",
         "1" + "0" * 400, "-1" + "0" * 400, "1" * 5_000, "0" * 5_000 + "1", "+5", "-0"]  # fmt: skip
DECIMAL = ["0.0", "-0.0", "1.5", "-2.5", "0.1", "9007199254740992.5",
           "9223372036854775807.5", "-9223372036854775808.5",
           "9223372036854775807.0", "1e18", "1e19", "1e400", "-1e400", "1e-400", "-1e-400", "5e-324", "1e300",
           ".5", "2.",
           "7214839472947593217.0", "1e99999999999999999999", "-1e99999999999999999999", "1e-99999999999999999999",
           "0e99999999999999999999", "9007199254740993.0"]  # fmt: skip
PATTERNS = ["", "%", "_", "a%", "%b", "%a%", "a_b", "a\\_b", "100\\%", "%\\%", "__", "%_%_%", "_%_", "%a%b%",
            "a%b", "%é%", "(a|b)%",
            "[a-z]%", ".%", "^a$", "a\\\\b", "_" * 50, "%" * 500 + "a"]  # fmt: skip
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
Holds = Callable[[dict[str, Any]], bool | None]


def rows(chance: random.Random, num: int) -> list[dict[str, Any]]:
    """Rows of every kind, a sixth of their values null."""
    kinds = {"i": INTS, "j": INTS, "f": FLOATS, "g": FLOATS, "m": INTS + [as_kept(value) for value in FLOATS],
             "b": [True, False], "c": [True, False],
             "s": TEXTS, "u": TEXTS, "d": DAYS, "t": TIMES, "z": TIMES}  # fmt: skip
    return [
        {name: chance.choice(values) if chance.random() > 1 / 6 else None for name, values in kinds.items()}
        for _ in range(num)
    ]


def as_kept(value: float) -> float:
    """A number as files of both kinds tell it: 2.0 is written as 2, from 10 ** 15 on with an exponent."""
    return int(value) if abs(value) < 1e15 and value.is_integer() else value


def columns_of(table: list[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {
        name: pa.chunked_array([pa.array([row[name] for row in table], kind)])
        for name, kind in KINDS.items()
        if name != "m"
    }
    texts = pa.chunked_array(
        [
            pa.concat_arrays(
                [pa.array([row["m"]]).cast(pa.string()) for row in table]  # as files of both kinds keep them
            )
        ]
    )
    return columns | {"m": Numbers.of_texts(texts)}


class Numeral:
    """A number as Python compares it: exactly with whole ones, as a float with those unless it is whole itself."""

    def __init__(self, text: str) -> None:
        self.whole = re.fullmatch(r"[-+]?\d+", text) is not None
        self.nearest = float(text)
        mantissa, _, exponent = text.partition("e")
        power = int(exponent or 0)
        if abs(power) > 1_000 and float(mantissa):
            self.exact = Fraction(Decimal(mantissa)) * (Fraction(10) ** (1_000 if power > 0 else -1_000))
        else:
            self.exact = Fraction(Decimal(mantissa)) * Fraction(10) ** (power if float(mantissa) else 0)

    def next_to(self, value: float) -> tuple[Any, Any]:
        """The value and this number, as two things that Python compares exactly."""
        if isinstance(value, int):
            return value, self.exact
        if self.whole:  # a float is compared with a whole number exactly
            return (value, self.exact) if value in (float("inf"), float("-inf")) else (Fraction(value), self.exact)
        return value, self.nearest


numeral = functools.cache(Numeral)


def comparison(chance: random.Random) -> tuple[str, Holds]:
    """A comparison, as text and as what it means."""
    name = chance.choice(list(KINDS))
    form = chance.random()
    if form < 0.1:
        inverted = chance.random() < 0.5
        return f"{name} is {'not ' * inverted}null", lambda row: (row[name] is None) != inverted
    if name in "bc" and form < 0.3:
        return name, lambda row: row[name]
    if name in "su" and form < 0.4:
        pattern = chance.choice(PATTERNS)
        wanted = re.compile(as_regex(pattern), re.DOTALL)
        inverted = chance.random() < 0.3
        return (
            f"{name} {'not ' * inverted}like {quoted(pattern)}",
            lambda row: None if row[name] is None else (wanted.fullmatch(row[name]) is not None) != inverted,
        )
    if form < 0.6:
        values = [literal(chance, name) for _ in range(chance.choice([1, 2, 5, 20]))]
        inverted = chance.random() < 0.3
        text = f"{name} {'not ' * inverted}in ({', '.join(text for text, _ in values)})"
        equal = SIGNS["="]
        return (
            text,
            lambda row: (
                None if row[name] is None else any(equal(*pair(row[name], value)) for _, value in values) != inverted
            ),
        )
    sign = chance.choice(list(SIGNS))
    holds = SIGNS[sign]
    if form < 0.75:
        other = chance.choice([n for n in KINDS if KINDS[n] == KINDS[name] or (name in NUMBERS and n in NUMBERS)])
        return (
            f"{name} {sign} {other}",
            lambda row: None if None in (row[name], row[other]) else holds(row[name], row[other]),
        )
    text, value = literal(chance, name)
    if form < 0.85:
        return f"{text} {sign} {name}", lambda row: None if row[name] is None else holds(*pair(row[name], value)[::-1])
    return f"{name} {sign} {text}", lambda row: None if row[name] is None else holds(*pair(row[name], value))


def pair(value: Any, other: Any) -> tuple[Any, Any]:
    return other.next_to(value) if isinstance(other, Numeral) else (value, other)


def literal(chance: random.Random, name: str) -> tuple[str, Any]:
    if name in NUMBERS:
        text = chance.choice(WHOLE + DECIMAL)
        return text, numeral(text)
    if name in "bc":
        value = chance.random() < 0.5
        return str(value), value
    if name in "su":
        text = chance.choice(TEXTS)
        return quoted(text), text
    if name == "d":
        day = chance.choice(DAYS)
        return f"'{day.isoformat()}'", day
    time = chance.choice(TIMES)
    return f"'{time.isoformat()}{'Z' if name == 'z' and chance.random() < 0.5 else ''}'", time


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def as_regex(pattern: str) -> str:
    parts = re.findall(r"\\[%_\\]|%+|.", pattern, re.DOTALL)
    return "".join({"%": ".*", "_": "."}.get(part[0]) or re.escape(part[-1]) for part in parts)


def expression(chance: random.Random, depth: int) -> tuple[str, Holds]:
    """An expression of comparisons, by Kleene's logic."""
    form = chance.random()
    if depth == 0 or form < 0.3:
        return comparison(chance)
    text, holds = expression(chance, depth - 1)
    if form < 0.45:
        return f"not ({text})", lambda row: None if holds(row) is None else not holds(row)
    other_text, other = expression(chance, depth - 1)
    if form < 0.7:

        def both(row: dict[str, Any]) -> bool | None:
            found = holds(row), other(row)
            return False if False in found else None if None in found else True

        return f"({text}) and ({other_text})", both

    def either(row: dict[str, Any]) -> bool | None:
        found = holds(row), other(row)
        return True if True in found else None if None in found else False

    return f"({text}) or ({other_text})", either


@pytest.mark.parametrize("seed", range(5))
def test_typed_expressions_hold_of_what_they_do_in_python(seed: int) -> None:
    chance = random.Random(seed)
    table = rows(chance, 24)
    columns = columns_of(table)
    for _ in range(EACH):
        text, holds = expression(chance, chance.randrange(4))
        found = parse(text, KINDS).mask(columns).to_pylist()
        assert found == [holds(row) for row in table], text[:500]
