"""What the verbs write: results on stdout, remarks on stderr."""

import codecs
import json
import math
import re
import struct
import sys
from typing import Any

from rich.console import Console

from pipeline.plain_log import CONTROLS, escaped

WIDTH_WITHOUT_TERMINAL = 120
LARGEST_FLOAT32 = float.fromhex("0x1.fffffep+127")
DIGITS = 12  # of a float in JSON; float64 arithmetic leaves its noise behind the fifteenth

stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PLAIN = {"…": "...", "█": "#"}  # what our own sentences hold beyond ASCII, where the terminal lacks it


def print_json(document: Any) -> None:
    """One JSON document on stdout: in UTF-8 as it is, in ASCII with escapes where stdout has another encoding."""
    rounded = _rounded(document)
    text = json.dumps(rounded, indent=1, ensure_ascii=False, allow_nan=False)
    if not _is_utf8(sys.stdout.encoding) or (not text.isascii() and _has_surrogates(text)):
        text = json.dumps(rounded, indent=1, allow_nan=False)
    # The format itself escapes the first 32 of them only.
    text = CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)
    sys.stdout.write(text + "\n")


def say(text: str) -> None:
    """A line of a result on stdout."""
    stdout.print(printable(text, sys.stdout.encoding), markup=False)


def note(text: str) -> None:
    """A remark on stderr."""
    stderr.print(printable(f"note: {text}", sys.stderr.encoding), markup=False)


def tell(text: str) -> None:
    """A line of what is being done, on stderr."""
    stderr.print(printable(text, sys.stderr.encoding), markup=False)


def counted(number: int, thing: str) -> str:
    """A number with its noun: "1 file", "2,000 files", "1 entry", "2 entries"."""
    many = f"{thing[:-1]}ies" if thing.endswith("ry") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else many}"


def printable(text: str, encoding: str | None) -> str:
    """A line as a terminal may be given it, whatever a label or a uri holds: one line, and in its encoding."""
    text = CONTROLS.sub(_escaped, text)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        for character, plain in _PLAIN.items():
            text = text.replace(character, plain)
        text = text.encode(encoding or "ascii", "backslashreplace").decode(encoding or "ascii")
    return text


def _escaped(found: re.Match[str]) -> str:
    return _NAMED.get(found[0]) or escaped(found)


def _is_utf8(encoding: str | None) -> bool:
    try:
        return codecs.lookup(encoding or "ascii").name == "utf-8"
    except LookupError:
        return False


def _has_surrogates(text: str) -> bool:
    """Whether a file's name that is no UTF-8 is in it."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _rounded(value: Any) -> Any:
    """A document whose floats have the digits that mean something.

    What came from float32, as similarities do, is written with as few digits as lead back to the same float32.
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
        return value  # which `json` refuses
    if abs(value) <= LARGEST_FLOAT32 and _as_float32(value) == value:
        return next(short for digits in range(1, 18) if _as_float32(short := float(f"{value:.{digits}g}")) == value)
    return float(f"{value:.{DIGITS}g}")


def _as_float32(value: float) -> float:
    [found] = struct.unpack("f", struct.pack("f", value))
    return float(found)
