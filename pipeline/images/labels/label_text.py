"""Labels as text: decoding from bytes, and the check of what can be a label."""

import codecs
import math

MAX_LABEL = 10_000  # characters: a caption is shorter, and every entry stores its label

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(data: bytes) -> str:
    """The encoding of a text: that of its byte order mark, UTF-16 if every other byte is zero, else UTF-8."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    sample = data[:1024]
    if len(sample) >= 2 and len(sample) % 2 == 0:
        if not any(sample[1::2]) and all(sample[::2]):
            return "utf-16-le"
        if not any(sample[::2]) and all(sample[1::2]):
            return "utf-16-be"
    return "utf-8"


def text_of_bytes(data: bytes) -> str:
    """The text in some bytes, without its byte order mark and the zeros that fill a field of fixed width.

    Bytes that are not of the encoding become the replacement character.
    """
    encoding = encoding_of(data)
    return (data.rstrip(b"\0") if encoding == "utf-8" else data).decode(encoding, errors="replace")


def clean_label(text: str | None) -> str | None:
    """A text as a label; None if it is blank, too long, or has a NUL (no tool shows it)."""
    return text if text and len(text) <= MAX_LABEL and text.strip() and "\0" not in text else None


def text_of(value: object) -> str | None:
    """The label of a scalar value; None if it is no label (`why_no_label` has the reason).

    Whole floats lose their ".0", because pandas turns a column of integers into floats as soon as it has a null.
    Bytes are text in UTF-8, or in UTF-16 if they look like it.
    """
    if value is None or isinstance(value, (dict, list, tuple, set)):
        return None
    if isinstance(value, bytes):
        return clean_label(text_of_bytes(value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    # JSON can contain half a surrogate pair.
    return clean_label(str(value).encode("utf-8", errors="replace").decode())


def why_no_label(value: object, where: str) -> str:
    """Why `text_of` finds no label in a value; `where` names the place of the value, such as "the column label"."""
    if isinstance(value, (list, tuple, set)):
        return f"{where} holds a list"
    if isinstance(value, dict):
        return f"{where} holds an object"
    text = text_of_bytes(value) if isinstance(value, bytes) else value
    if isinstance(text, str) and "\0" in text:
        return f"{where} holds a NUL character"
    if isinstance(text, str) and len(text) > MAX_LABEL:
        return f"{where} holds a text of {len(text):,} characters, more than {MAX_LABEL:,}"
    return f"{where} is empty" if value is not None else f"{where} says nothing of it"
