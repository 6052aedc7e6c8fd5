"""The output of the verbs: results on stdout, remarks on stderr."""

import codecs
import json
import math
import re
import struct
import sys
from typing import Any

from rich.console import Console

from pipeline.plain_log import CONTROLS, escape_controls

WIDTH_WITHOUT_TERMINAL = 120
LARGEST_FLOAT32 = float.fromhex("0x1.fffffep+127")
DIGITS = 12  # of a float in JSON; rounding errors of float64 begin after the fifteenth

stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PLAIN = {"…": "...", "█": "#"}  # non-ASCII characters of our own messages, for terminals that lack them


def print_json(document: Any) -> None:
    """Print one JSON document on stdout: unescaped if stdout is UTF-8, otherwise ASCII with escapes."""
    rounded = _rounded(document)
    text = json.dumps(rounded, indent=1, ensure_ascii=False, allow_nan=False)
    if not _is_utf8(sys.stdout.encoding) or (not text.isascii() and _has_surrogates(text)):
        text = json.dumps(rounded, indent=1, allow_nan=False)
    # JSON itself escapes only the first 32 control characters.
    text = CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)
    sys.stdout.write(text + "\n")


def say(text: str) -> None:
    """Print a line of a result on stdout."""
    stdout.print(printable(text, sys.stdout.encoding), markup=False)


def note(text: str) -> None:
    """Print a remark on stderr."""
    stderr.print(printable(f"note: {text}", sys.stderr.encoding), markup=False)


def tell(text: str) -> None:
    """Print a line about the work under way on stderr."""
    stderr.print(printable(text, sys.stderr.encoding), markup=False)


def counted(number: int, thing: str) -> str:
    """A number with its noun: "1 file", "2,000 files", "1 entry", "2 entries"."""
    many = f"{thing[:-1]}ies" if thing.endswith("ry") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else many}"


def printable(text: str, encoding: str | None) -> str:
    """A line that is safe for a terminal, whatever a label or a uri holds: one line, in its encoding."""
    text = CONTROLS.sub(_escaped, text)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        for character, plain in _PLAIN.items():
            text = text.replace(character, plain)
        text = text.encode(encoding or "ascii", "backslashreplace").decode(encoding or "ascii")
    return text


def _escaped(found: re.Match[str]) -> str:
    return _NAMED.get(found[0]) or escape_controls(found)


def _is_utf8(encoding: str | None) -> bool:
    try:
        return codecs.lookup(encoding or "ascii").name == "utf-8"
    except LookupError:
        return False


def _has_surrogates(text: str) -> bool:
    """Whether the text contains a file name that is not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _rounded(value: Any) -> Any:
    """A document whose floats are rounded to the digits that carry information.

    A value that came from float32, such as a similarity, gets the fewest digits that parse to the same float32.
    """
    if isinstance(value, float):
        return _short_float(value)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value


def _short_float(value: float) -> float:
    if not math.isfinite(value):
        return value  # `json` refuses these
    if abs(value) <= LARGEST_FLOAT32 and _as_float32(value) == value:
        return next(short for digits in range(1, 18) if _as_float32(short := float(f"{value:.{digits}g}")) == value)
    return float(f"{value:.{DIGITS}g}")


def _as_float32(value: float) -> float:
    [found] = struct.unpack("f", struct.pack("f", value))
    return float(found)
