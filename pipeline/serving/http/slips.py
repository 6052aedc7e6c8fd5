"""Common mistakes in requests, and what to do instead, in the words of a request: fields, never flags."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

MAX_SHOWN = 60  # characters of the request that an answer repeats
AS_FORM = "curl -F image=@new.jpg"

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # first bytes of image files
_PAIRS = re.compile(rb"\s*[A-Za-z_][A-Za-z0-9_]{0,40}=")
_MEANT = {  # names of other programs; the first field that the body has is suggested
    "image": ("image_base64",),
    "images": ("image_base64",),
    "file": ("image_base64",),
    "data": ("image_base64",),
    "base64": ("image_base64",),
    "vector": ("embedding",),
    "query": ("embedding",),
    "class": ("label", "labels"),
    "name": ("label", "labels"),
    "top_k": ("k",),
    "limit": ("k",),
    "num_neighbors": ("k",),
    "filter": ("where",),
    "method": ("voting",),
}
_ADDRESSES = {"image_url", "url", "image_uri", "link"}
_PARAMETER = re.compile(r"(?<!run )`([a-z][a-z_]*)`")
_OPTION = re.compile(r"--([a-z][a-z-]*)")
_SHOWS_IDS = re.compile(r"`search`(?: and `classify --json`)? shows?(?: the)? ids(?: there are)?")


def shorten(text: str) -> str:
    """A client's text, shortened to one line."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: MAX_SHOWN * 2]).split())
    return f"{line[:MAX_SHOWN]}…" if len(text) > MAX_SHOWN else line


def in_fields(message: str) -> str:
    """A message of the library in the words of a request: fields instead of parameters and command-line options."""
    message = _SHOWS_IDS.sub("POST /v1/search shows ids", message)
    message = _PARAMETER.sub(r"\1", message)
    return _OPTION.sub(lambda option: option[1].replace("-", "_"), message)


def without_place(message: str, uri: str) -> str:
    """The message without the location of the memory."""
    for place in sorted({uri, os.path.abspath(uri), os.path.realpath(uri)}, key=len, reverse=True):
        if place.strip("/"):
            message = message.replace(f"the memory at {place}", "the memory").replace(place, "the memory")
    return message


def type_not_taken(content_type: str, *, images: bool) -> str:
    """Why a content type is refused, and how to send the request instead."""
    if not images:
        return f"{shorten(content_type)} is not taken: send application/json"
    is_file = content_type.startswith("image/") or content_type == "application/octet-stream"
    how = f"; an image goes as a file in a form: {AS_FORM}" if is_file else ""
    return f"{shorten(content_type)} is not taken: send application/json or multipart/form-data{how}"


def is_image(data: bytes) -> bool:
    """Whether a body is an image file."""
    return data.startswith(_IMAGES)


def no_json(data: bytes, problem: str, *, images: bool) -> str:
    """Why a body is not JSON, and what it seems to be."""
    form = " (with curl: -F image=@new.jpg rather than --data-binary @new.jpg)" if images else ""
    if is_image(data):
        return f"the body is the file of an image: send it as a file in a form{form}, or in base64 within JSON"
    if data.lstrip().startswith(b"--") and b"form-data" in data[:1_000]:
        return "the body is a form, and its content type does not say so: let your program write that header"
    if _PAIRS.match(data):
        return "the body is fields of a form and no JSON: send a JSON object, as application/json" + (
            f", or a form with files: {AS_FORM}" if images else ""
        )
    return f"the body is no JSON ({problem}): send a JSON object"


def image_as_text(text: str) -> str:
    """What to do about a form that sends the image as a text field."""
    if len(text) > 500 or text.startswith("data:"):
        return f"image was sent as text: send it as a file ({AS_FORM}), or its base64 as image_base64"
    name = shorten(text.strip().lstrip("@<")) or "new.jpg"
    return f"image was sent as text ({name!r}): send it as a file: image=@{name}, in curl with the @"


def unknown_field(kind: type[BaseModel] | None, field: str, value: Any) -> str:
    """What to do about a field that the body does not have."""
    if field in _ADDRESSES:
        return f"{field} is not asked for: nothing is fetched from an address; send the image itself, as image_base64"
    known = list(kind.model_fields) if kind is not None else []
    near = [name for name in _MEANT.get(field.lower(), ()) if name in known]
    folded = field.replace("-", "_").lower()
    near += [name for name in known if name in (folded, f"{folded}s", folded.removesuffix("s"))]
    near += difflib.get_close_matches(folded, known, 1, 0.65) if len(folded) <= MAX_SHOWN else []
    if not near:
        return f"{shorten(field)} is not asked for: leave it out"
    meant = near[0]
    if kind is not None and _is_list(kind, meant) and _is_short(value):
        meant += f": {json.dumps([value], ensure_ascii=False)}"
    return f"{shorten(field)} is not asked for: did you mean {meant}?"


def alone_for_list(field: str, value: Any) -> str:
    """What to do about a single value in place of a list."""
    example = f", as in {field}: {json.dumps([value], ensure_ascii=False)}" if _is_short(value) else ""
    return f"{field} is wrong: give a list{example}"


def _is_list(kind: type[BaseModel], field: str) -> bool:
    return str(kind.model_fields[field].annotation).startswith(("list", "typing.List"))


def _is_short(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_SHOWN
    )


def too_many(field: str | None, most: int) -> str | None:
    """What to do about a list that is too long; None if pydantic's message is good enough."""
    if field is None:
        return f"the list has no question, or too many: give 1 to {most}"
    if field in {"image_base64", "embedding"}:
        return f"more than {most} queries are too many for one request: ask in batches"
    return None


def place_of(problem: Sequence[str | int]) -> list[str]:
    """Where in a body the problem is, without the position of the question in a list."""
    return [str(part) for part in (problem[1:] if problem and isinstance(problem[0], int) else problem)]
