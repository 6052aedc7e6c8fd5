"""The expression of `--where`: it selects the entries that take part in a question, by their columns.

    condition  = all (OR all)*
    all        = one (AND one)*
    one        = NOT one | "(" condition ")" | comparison
    comparison = value (("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value)+
               | column [NOT] IN "(" literal ("," literal)* ")"
               | column [NOT] LIKE text
               | column IS [NOT] NULL
               | column                             a column of booleans
    value      = column | literal
    column     = name | "`" any name "`"
    literal    = number | text | TRUE | FALSE
    text       = "'" … "'" | '"' … '"'              a quote inside is doubled: 'it''s'

Words in capitals are keywords, in any case. NONE means NULL. IN also takes square brackets. A chain such as
`2000 <= year < 2010` works as in Python. In a LIKE pattern, `%` matches any text and `_` matches any character. A
backslash before either makes it literal. Dates and times are texts in ISO 8601. A date alone means its midnight. A time
without a zone means UTC in a column with zones. Numbers are compared exactly (pipeline/index/search/comparisons.py).

As in SQL, a comparison with a null is neither true nor false, and `NOT` does not make it true. Only IS NULL finds
nulls. NaN counts as null. An expression is parsed by this grammar and never run as code.
"""

import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.deadline import look
from pipeline.errors import UsageError
from pipeline.index.search.comparisons import (
    SIGNS,
    TURNED,
    Number,
    Truths,
    Values,
    compare,
    compare_columns,
    inside,
    is_valid,
)

MAX_DEPTH = 100  # of nested brackets, far below the recursion limit of Python
MAX_SHOWN = 200  # characters of an expression that a message repeats

# The cost of a comparison in nanoseconds a row, measured on an AMD EPYC with texts of 40 characters: numbers took 0.6
# to 5, texts 1 to 3, IN 15 to 24, LIKE 100. LIKE runs in RE2. RE2 takes longer for each open place (`_`) after a `%`,
# because it must try every position where the pattern may begin. 12 open places cost 8 ns a character, 30 cost 118, and
# 1,000 cost 960.
NS_NUMBER = 2.0
NS_TEXT = 4.0
NS_NUMBERS_OF_TWO_KINDS = 10.0
NS_IN = 25.0
NS_LIKE = 110.0
OPEN_PLACES_FREE = 12
NS_OPEN_PLACE = 4.0 * 64  # of a text of 64 characters
NS_OPEN_PLACES = 1_000.0 * 64

Columns = Mapping[str, Values]
Mask = Callable[[Columns], Truths]  # takes columns; returns true, false or null for each row

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
    | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<name>`[^`]+`|[^\W\d]\w*)
    | (?P<sign>==|!=|<>|<=|>=|[=<>(),\[\]])
    )""",
    re.VERBOSE,
)
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
    """A word of an expression and its position. `word` is a keyword in lower case, a sign, or empty."""

    kind: str
    written: str
    at: int
    word: str = ""


@dataclass(frozen=True)
class Literal:
    """A value written in an expression."""

    value: bool | str | Number
    written: str


@dataclass(frozen=True)
class Column:
    """A column that an expression names."""

    name: str
    kind: pa.DataType


@dataclass(frozen=True)
class Condition:
    """A parsed expression: the columns it uses, and the mask that says which rows satisfy it.

    `cost` is its estimated time in nanoseconds a row. `terms` is its number of comparisons.
    """

    columns: frozenset[str]
    mask: Mask
    cost: float
    terms: int


def parse(text: str, kinds: Mapping[str, pa.DataType]) -> Condition:
    """Parse an expression over columns of these kinds. Raises UsageError, in one sentence, if it is not valid."""
    if not isinstance(text, str):
        raise UsageError(f"where is {text!r}: give an expression as text, such as \"label = 'cat'\"")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("where has a character that is none (half a surrogate pair): write it as UTF-8") from None
    reader = _Reader(text, kinds)
    mask = _answerable(reader.condition(0))
    if reader.next is not None:
        reader.expected("and, or, or the end")
    return Condition(frozenset(reader.columns), mask, reader.cost, reader.terms)


def _answerable(mask: Mask) -> Mask:
    """The mask, with errors of pyarrow (except ArrowMemoryError) raised as UsageError."""

    def asked(columns: Columns) -> Truths:
        try:
            return mask(columns)
        except pa.ArrowMemoryError:
            raise
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"where asks what cannot be worked out ({reason}): write it in another way") from error

    return asked


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


class _Reader:
    """Reads tokens from left to right. Each method reads the part of the grammar that has its name."""

    def __init__(self, text: str, kinds: Mapping[str, pa.DataType]) -> None:
        self._text = text
        self._kinds = kinds
        self._tokens = _tokens(text)
        self._position = 0
        self.columns: set[str] = set()
        self.cost = 0.0
        self.terms = 0

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
        if self.next is not None and self.next.word in SIGNS:
            return self._chain(left)
        if not isinstance(left, Column):
            self.expected("a comparison")
        if self._took("is"):
            inverted = self._took("not")
            if not (self._took("null") or self._took("none")):
                self.expected("null")
            return self._term(NS_NUMBER, lambda columns: _inverted_if(not inverted, is_valid(columns[left.name])))
        inverted = self._took("not")
        if self._took("in"):
            mask = self._in(left)
        elif self._took("like"):
            mask = self._like(left)
        elif inverted:
            self.expected("in or like")
        elif left.kind == pa.bool_():
            return self._term(NS_NUMBER, lambda columns: columns[left.name])
        else:
            self.expected(f"a comparison of the column {left.name}, such as = or in")
        return _inverted(mask) if inverted else mask

    def _chain(self, left: Column | Literal) -> Mask:
        masks = []
        while self.next is not None and self.next.word in SIGNS:
            sign = SIGNS[self.next.word]
            self._position += 1
            right = self._value()
            masks.append(self._compared(left, sign, right))
            left = right
        return _joined(pc.and_kleene, masks)

    def _compared(self, left: Column | Literal, sign: str, right: Column | Literal) -> Mask:
        if isinstance(left, Column) and isinstance(right, Column):
            if _GIVE[left.kind] != _GIVE[right.kind]:
                raise UsageError(
                    f"where cannot compare the columns {left.name} ({left.kind}) and {right.name} ({right.kind}): "
                    "name columns of one type"
                )
            cost = NS_TEXT if left.kind == right.kind else NS_NUMBERS_OF_TWO_KINDS
            return self._term(cost, lambda columns: compare_columns(columns[left.name], sign, columns[right.name]))
        if isinstance(left, Column) and isinstance(right, Literal):
            value = _comparable(left, right)
            cost = NS_TEXT if left.kind == pa.string() else NS_NUMBER
            return self._term(cost, lambda columns: compare(columns[left.name], sign, value))
        if isinstance(left, Literal) and isinstance(right, Column):
            return self._compared(right, TURNED[sign], left)
        raise UsageError(f"where compares {_shown(left.written)} with a value and no column: {self._there_are()}")  # type: ignore[union-attr]

    def _in(self, column: Column) -> Mask:
        closing = "]" if self._took("[") else ")"
        if closing == ")":
            self._take("(")
        values = [_comparable(column, self._literal())]
        while self._took(","):
            if self.next is not None and self.next.word == closing:
                break
            values.append(_comparable(column, self._literal()))
        self._take(closing)
        is_one = inside(column.kind, values)
        return self._term(NS_IN, lambda columns: is_one(columns[column.name]))

    def _like(self, column: Column) -> Mask:
        if column.kind != pa.string():
            raise UsageError(f"where asks what the column {column.name} ({column.kind}) is like: only a text is")
        literal = self._literal()
        pattern = literal.value
        if not isinstance(pattern, str):
            raise UsageError(
                f"where says {column.name} like {_shown(literal.written)}: give a text in quotes, such as 'Canon%'"
            )
        return self._term(_cost_of_like(pattern), lambda columns: pc.match_like(columns[column.name], pattern))

    def _term(self, cost: float, mask: Mask) -> Mask:
        """The mask of one comparison, which first checks the deadline. Adds to `cost` and `terms`."""
        self.terms += 1
        self.cost += cost

        def compared(columns: Columns) -> Truths:
            look()
            return mask(columns)

        return compared

    def _value(self) -> Column | Literal:
        token = self.next
        if token is not None and token.kind == "name" and not token.word:
            self._position += 1
            return self._column(token)
        return self._literal()

    def _column(self, token: Token) -> Column:
        name = token.written.strip("`")
        if name not in self._kinds:
            raise UsageError(f"where names {_shown(name)}, which is no column: {self._there_are()}")
        self.columns.add(name)
        return Column(name, self._kinds[name])

    def _literal(self) -> Literal:
        token = self.next
        value: bool | str | Number
        if token is None:
            self.expected("a value")
        elif token.kind == "text":
            quote = token.written[0]
            value = token.written[1:-1].replace(quote * 2, quote)
        elif token.kind == "number":
            value = Number.read(token.written)
        elif token.word in ("true", "false"):
            value = token.word == "true"
        elif token.word in ("null", "none"):
            raise UsageError("where compares with null, which nothing equals: write `is null` or `is not null`")
        elif token.kind == "name" and not token.word:
            raise UsageError(f"where has {_shown(token.written)} where a value must be: a text stands in quotes")
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
        """Raise UsageError: the next token is not what must be here."""
        if self.next is None:
            raise UsageError(f"where ends where {what} must be: {_shown(self._text) or 'it is empty'}")
        there = f"{_shown(self.next.written)} at character {self.next.at + 1}"
        raise UsageError(f"where has {there} and not {what}: {_shown(self._text)}")

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
                raise UsageError(f"where has a quote at character {start + 1} that is not closed: {_shown(text)}")
            raise UsageError(f"where cannot be read from character {start + 1} on, at {text[start]}: {_shown(text)}")
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


def _inverted_if(invert: bool, truths: Truths) -> Truths:
    return pc.invert(truths) if invert else truths


def _cost_of_like(pattern: str) -> float:
    """The cost of a LIKE pattern in nanoseconds a row."""
    _, _, behind = pattern.partition("%")
    open_places = behind.count("_")
    if open_places <= OPEN_PLACES_FREE:
        return NS_LIKE + NS_OPEN_PLACE / OPEN_PLACES_FREE * open_places
    return min(NS_LIKE + NS_OPEN_PLACE * open_places, NS_OPEN_PLACES)


def _comparable(column: Column, literal: Literal) -> pa.Scalar | Number:
    """A literal in the form in which it is compared with a column: a number, or a scalar of the column's kind."""
    value, kind = literal.value, column.kind
    try:
        if pa.types.is_boolean(kind) and isinstance(value, bool):
            return pa.scalar(value)
        if pa.types.is_string(kind) and isinstance(value, str):
            return pa.scalar(value)
        if (pa.types.is_floating(kind) or pa.types.is_integer(kind)) and isinstance(value, Number):
            return value
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
    return UsageError(f"where cannot compare {there} with {_shown(literal.written)}: give {_GIVE[column.kind]}")
