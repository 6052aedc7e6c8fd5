"""The expression of `--where`: which entries take part in a question, by what is known of them.

    condition  = all (OR all)*
    all        = one (AND one)*
    one        = NOT one | "(" condition ")" | comparison
    comparison = value (("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value)+
               | column [NOT] IN "(" literal ("," literal)* ")"
               | column [NOT] LIKE text
               | column IS [NOT] NULL
               | column                             one of truth values
    value      = column | literal
    column     = name | "`" any name "`"
    literal    = number | text | TRUE | FALSE
    text       = "'" … "'" | '"' … '"'              a quote inside is doubled: 'it''s'

Words in capitals are read in any case, NONE is NULL, and square brackets do for the round ones of IN. A chain such as
`2000 <= year < 2010` is as in Python. In a LIKE, `%` stands for any text, `_` for any character, a backslash takes
either for itself. Dates and times are texts as ISO 8601 has them; a date alone is its midnight, and a time without a
zone is taken as UTC in a column that has zones.

As in SQL a comparison with a null is neither true nor false, and `NOT` does not make it true: only IS NULL finds nulls.
A NaN counts as null. An expression is read by this grammar and never run as code.
"""

import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UsageError

MAX_DEPTH = 100  # of brackets in brackets, far below the depth at which Python gives up
MAX_INT64 = 2**63

Columns = Mapping[str, pa.ChunkedArray]
Mask = Callable[[Columns], pa.ChunkedArray]  # of columns; true, false or null for each row

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
    | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<name>`[^`]+`|[^\W\d]\w*)
    | (?P<sign>==|!=|<>|<=|>=|[=<>(),\[\]])
    )""",
    re.VERBOSE,
)
_COMPARISONS = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_WORDS = {"and", "or", "not", "in", "is", "null", "none", "like", "true", "false"}
_GIVE = {
    pa.bool_(): "true or false",
    pa.int64(): "a number",
    pa.float64(): "a number",
    pa.string(): "a text in quotes",
    pa.date32(): "a date such as '2024-12-31'",
    pa.timestamp("us"): "a time such as '2024-12-31T23:59'",
    pa.timestamp("us", tz="UTC"): "a time such as '2024-12-31T23:59+01:00'",
}


@dataclass(frozen=True)
class Token:
    """A word of an expression and where it stands; `word` is a keyword in small letters, a sign, or empty."""

    kind: str
    written: str
    at: int
    word: str = ""


@dataclass(frozen=True)
class Literal:
    """A value that an expression gives."""

    value: bool | float | str
    written: str


@dataclass(frozen=True)
class Column:
    """A column that an expression names."""

    name: str
    kind: pa.DataType


@dataclass(frozen=True)
class Condition:
    """An expression that was read: the columns it asks for, and what it says of rows that have them."""

    columns: frozenset[str]
    mask: Mask


def parse(text: str, kinds: Mapping[str, pa.DataType]) -> Condition:
    """Read an expression over columns of these kinds. Raises UsageError, in one sentence, for what cannot be asked."""
    if not isinstance(text, str):
        raise UsageError(f"where is {text!r}: give an expression as text, such as \"label = 'cat'\"")
    reader = _Reader(text, kinds)
    mask = reader.condition(0)
    if reader.next is not None:
        reader.expected("and, or, or the end")
    return Condition(frozenset(reader.columns), mask)


class _Reader:
    """Reads tokens from left to right; each method reads what the grammar calls so."""

    def __init__(self, text: str, kinds: Mapping[str, pa.DataType]) -> None:
        self._text = text
        self._kinds = kinds
        self._tokens = _tokens(text)
        self._position = 0
        self.columns: set[str] = set()

    @property
    def next(self) -> Token | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def condition(self, depth: int) -> Mask:
        return self._several("or", pc.or_kleene, self._all, depth)

    def _all(self, depth: int) -> Mask:
        return self._several("and", pc.and_kleene, self._one, depth)

    def _several(self, word: str, join: Callable[..., Any], read: Callable[[int], Mask], depth: int) -> Mask:
        masks = [read(depth)]
        while self._took(word):
            masks.append(read(depth))
        return _joined(join, masks)

    def _one(self, depth: int) -> Mask:
        if depth > MAX_DEPTH:
            raise UsageError(f"where has more than {MAX_DEPTH} brackets in brackets: write it with fewer")
        if self._took("not"):
            return _inverted(self._one(depth + 1))
        if self._took("("):
            mask = self.condition(depth + 1)
            self._take(")")
            return mask
        return self._comparison()

    def _comparison(self) -> Mask:
        left = self._value()
        if self.next is not None and self.next.word in _COMPARISONS:
            return self._chain(left)
        if not isinstance(left, Column):
            self.expected("a comparison")
        if self._took("is"):
            inverted = self._took("not")
            if not (self._took("null") or self._took("none")):
                self.expected("null")
            return lambda columns: (pc.is_valid if inverted else pc.is_null)(columns[left.name])
        inverted = self._took("not")
        if self._took("in"):
            mask = self._in(left)
        elif self._took("like"):
            mask = self._like(left)
        elif inverted:
            self.expected("in or like")
        elif left.kind == pa.bool_():
            return lambda columns: columns[left.name]
        else:
            self.expected(f"a comparison of the column {left.name}, such as = or in")
        return _inverted(mask) if inverted else mask

    def _chain(self, left: Column | Literal) -> Mask:
        masks = []
        while self.next is not None and self.next.word in _COMPARISONS:
            sign = self.next.word
            self._position += 1
            right = self._value()
            masks.append(self._compared(left, sign, right))
            left = right
        return _joined(pc.and_kleene, masks)

    def _compared(self, left: Column | Literal, sign: str, right: Column | Literal) -> Mask:
        compare = _COMPARISONS[sign]
        if isinstance(left, Column) and isinstance(right, Column):
            if _GIVE[left.kind] != _GIVE[right.kind]:
                raise UsageError(
                    f"where cannot compare the columns {left.name} ({left.kind}) and {right.name} ({right.kind}): "
                    "name columns of one type"
                )
            return lambda columns: compare(columns[left.name], columns[right.name])
        if isinstance(left, Column) and isinstance(right, Literal):
            scalar = _scalar(left, right)
            return lambda columns: compare(columns[left.name], scalar)
        if isinstance(left, Literal) and isinstance(right, Column):
            return self._compared(right, _TURNED.get(sign, sign), left)
        raise UsageError(f"where compares {left.written} with a value and no column: {self._there_are()}")  # type: ignore[union-attr]

    def _in(self, column: Column) -> Mask:
        closing = "]" if self._took("[") else ")"
        if closing == ")":
            self._take("(")
        scalars = [_scalar(column, self._literal())]
        while self._took(","):
            if self.next is not None and self.next.word == closing:
                break
            scalars.append(_scalar(column, self._literal()))
        self._take(closing)
        kind = pa.float64() if any(pa.types.is_floating(scalar.type) for scalar in scalars) else column.kind
        values = pa.array([scalar.as_py() for scalar in scalars], kind)

        def inside(columns: Columns) -> pa.ChunkedArray:
            asked = columns[column.name]
            found = pc.is_in(asked.cast(kind, safe=False), value_set=values)
            return pc.if_else(pc.is_valid(asked), found, pa.scalar(None, pa.bool_()))

        return inside

    def _like(self, column: Column) -> Mask:
        if column.kind != pa.string():
            raise UsageError(f"where asks what the column {column.name} ({column.kind}) is like: only a text is")
        pattern = self._literal().value
        if not isinstance(pattern, str):
            raise UsageError(f"where says {column.name} like {pattern}: give a text in quotes, such as 'Canon%'")
        return lambda columns: pc.match_like(columns[column.name], pattern)

    def _value(self) -> Column | Literal:
        token = self.next
        if token is not None and token.kind == "name" and not token.word:
            self._position += 1
            return self._column(token)
        return self._literal()

    def _column(self, token: Token) -> Column:
        name = token.written.strip("`")
        if name not in self._kinds:
            raise UsageError(f"where names {name}, which is no column: {self._there_are()}")
        self.columns.add(name)
        return Column(name, self._kinds[name])

    def _literal(self) -> Literal:
        token = self.next
        value: bool | float | str
        if token is None:
            self.expected("a value")
        elif token.kind == "text":
            quote = token.written[0]
            value = token.written[1:-1].replace(quote * 2, quote)
        elif token.kind == "number":
            value = int(token.written) if re.fullmatch(r"[-+]?\d{1,99}", token.written) else float(token.written)
        elif token.word in ("true", "false"):
            value = token.word == "true"
        elif token.word in ("null", "none"):
            raise UsageError("where compares with null, which nothing equals: write `is null` or `is not null`")
        elif token.kind == "name" and not token.word:
            raise UsageError(f"where has {token.written} where a value must be: a text stands in quotes")
        else:
            self.expected("a value")
        self._position += 1
        return Literal(value, token.written)

    def _took(self, word: str) -> bool:
        there = self.next is not None and self.next.word == word
        self._position += there
        return there

    def _take(self, word: str) -> None:
        if not self._took(word):
            self.expected(word)

    def expected(self, what: str) -> NoReturn:
        """Raises UsageError: something else stands where this must be."""
        if self.next is None:
            raise UsageError(f"where ends where {what} must be: {self._text or 'it is empty'}")
        raise UsageError(f"where has {self.next.written} at character {self.next.at + 1} and not {what}: {self._text}")

    def _there_are(self) -> str:
        names = [name if re.fullmatch(r"[^\W\d]\w*", name) else f"`{name}`" for name in self._kinds]
        return f"there are {', '.join(names[:-1])} and {names[-1]}, and a text stands in quotes"


def _tokens(text: str) -> list[Token]:
    tokens, at = [], 0
    end = len(text.rstrip())
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            if text[start] in "'\"`":
                raise UsageError(f"where has a quote at character {start + 1} that is not closed: {text}")
            raise UsageError(f"where cannot be read from character {start + 1} on, at {text[start]}: {text}")
        kind = str(found.lastgroup)
        written = found[kind]
        word = written if kind == "sign" else written.lower() if kind == "name" and written.lower() in _WORDS else ""
        tokens.append(Token(kind, written, found.start(kind), word))
        at = found.end()
    return tokens


def _joined(join: Callable[..., Any], masks: Sequence[Mask]) -> Mask:
    return lambda columns: functools.reduce(join, (mask(columns) for mask in masks))


def _inverted(mask: Mask) -> Mask:
    return lambda columns: pc.invert(mask(columns))


def _scalar(column: Column, literal: Literal) -> pa.Scalar:
    """A value as one to compare a column with: of its kind, or a decimal number for whole ones."""
    value, kind = literal.value, column.kind
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        if pa.types.is_boolean(kind) and isinstance(value, bool):
            return pa.scalar(value)
        if pa.types.is_string(kind) and isinstance(value, str):
            return pa.scalar(value)
        if pa.types.is_floating(kind) and is_number:
            return pa.scalar(float(value), kind)
        if pa.types.is_integer(kind) and is_number:
            fits = isinstance(value, int) and -MAX_INT64 <= value < MAX_INT64
            return pa.scalar(value, kind) if fits else pa.scalar(float(value))
        if pa.types.is_date(kind) and isinstance(value, str):
            return pa.scalar(datetime.date.fromisoformat(value), kind)
        if pa.types.is_timestamp(kind) and isinstance(value, str):
            return pa.scalar(_time(value, zoned=kind.tz is not None), kind)
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise _mismatch(column, literal) from error
    raise _mismatch(column, literal)


def _time(text: str, *, zoned: bool) -> datetime.datetime:
    time = datetime.datetime.fromisoformat(text)
    if zoned:
        return time.replace(tzinfo=time.tzinfo or datetime.UTC).astimezone(datetime.UTC)
    if time.tzinfo is not None:
        raise ValueError("the column has no zones")
    return time


def _mismatch(column: Column, literal: Literal) -> UsageError:
    there = f"the column {column.name} ({column.kind})"
    return UsageError(f"where cannot compare {there} with {literal.written}: give {_GIVE[column.kind]}")
