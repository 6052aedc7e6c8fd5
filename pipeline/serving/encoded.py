"""Decodes base64 as people send it: wrapped, in the URL alphabet, without padding, or as a data URL."""

import base64
import binascii
import re
import urllib.parse

from pipeline.errors import SourceError, UsageError

_DATA_URL = re.compile(r"\s*data:", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(?:https?|s3|s3a|gs|gcs|file)://", re.IGNORECASE)
_FILE_NAME = re.compile(r"\s*@?[^\n]{0,300}\.(?:jpe?g|png|gif|webp|bmp|tiff?)\s*", re.IGNORECASE)
_URL_ALPHABET = str.maketrans("-_", "+/")
_STRANGE = re.compile(r"[^A-Za-z0-9+/]")


def decode_image(text: str, field: str = "image_base64") -> bytes:
    """The bytes of a base64 text. White space and missing padding are accepted. Raises SourceError."""
    if _DATA_URL.match(text):
        head, comma, text = text.partition(",")
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise _refusal(field, "a data URL that is not in base64: write data:image/jpeg;base64,…")
        text = urllib.parse.unquote(text)
    elif _ADDRESS.match(text):
        raise _refusal(field, "an address, and nothing is fetched from one: send the bytes of the image in base64")
    elif _FILE_NAME.fullmatch(text):
        raise _refusal(field, "the name of a file: send the bytes of the file in base64")
    letters = "".join(text.split()).rstrip("=").translate(_URL_ALPHABET)
    try:
        data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        strange = _STRANGE.search(letters)  # slower than decoding, so only after a failure
        if strange:
            raise _refusal(field, f"no base64 (it has {strange[0]!r} in it): encode an image file") from None
        if len(letters) % 4 == 1:
            one = f"{len(letters):,} characters are one too many"
            raise _refusal(field, f"no base64 ({one}): send it whole") from None
        raise _refusal(field, f"no base64 ({error}): encode an image file") from None
    if not data:
        raise _refusal(field, "empty: encode an image file")
    return data


def about(field: str, error: UsageError | SourceError) -> UsageError | SourceError:
    """Set the field of the request that the error is about, and return the error."""
    error.field = field
    return error


def _refusal(field: str, what: str) -> UsageError | SourceError:
    return about(field, SourceError(f"{field} is {what}"))
