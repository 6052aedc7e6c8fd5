"""JSON bodies as models, or refused with the field. Their size is checked before anything is parsed.

The models that pydantic makes of a body cost a hundred bytes and more for each value, name and bracket. These are
counted in the raw bytes, at 0.1 ms a megabyte. A body with more of them than any question needs is refused.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pipeline.serving.http import slips
from pipeline.serving.http.bodies import MAX_QUERIES, Asking
from pipeline.serving.http.refused import Refused

SMALL_BYTES = 64 << 10  # a body up to this size cannot hold too much, and is parsed on the event loop
MAX_BRACKETS = 10_000
MAX_NAMES = 30_000  # of fields and of dictionary keys; colons in text count too
MAX_COMMAS_BESIDES = 1 << 18  # in addition to those between the numbers of embeddings

_BREAKS = re.compile(rb"[\x00-\x1f]")  # json.dumps escapes these


def check_body(kind: type[BaseModel], data: bytes, dimension: int, *, images: bool = False) -> Any:
    """A JSON body as a model. `dimension` is the memory's; `images`: the body may hold images. Raises Refused."""
    return _checked(_adapter_of(kind), data, kind, dimension, images=images)


def check_body_list(kind: type[BaseModel], data: bytes, dimension: int) -> Any:
    """A JSON body as a list of models. Raises Refused."""
    return _checked(_adapter_of_list(kind), data, kind, dimension, images=True)


@functools.cache
def _adapter_of(kind: type[BaseModel]) -> TypeAdapter:
    return TypeAdapter(kind)


@functools.cache
def _adapter_of_list(kind: type[BaseModel]) -> TypeAdapter:
    questions: Any = list[kind]  # type: ignore[valid-type]
    return TypeAdapter(Annotated[questions, Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True)])


def _checked(adapter: TypeAdapter, data: bytes, kind: type[BaseModel], dimension: int, *, images: bool) -> Any:
    if not data:
        raise Refused(400, "the body is empty: send JSON")
    check_amount(data, dimension)
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        if problems[0]["type"] != "json_invalid":
            raise explain_problems(problems, kind) from None
        said = problems[0]["msg"]
    mended = _with_control_characters(data)
    if mended is None:
        raise Refused(400, slips.no_json(data, said, images=images))
    return _checked(adapter, mended, kind, dimension, images=images)


def check_amount(data: bytes, dimension: int) -> None:
    """Raise Refused if JSON holds more values than questions to a memory of this dimension need."""
    if len(data) <= SMALL_BYTES:
        return
    bytes_N = np.frombuffer(data, np.uint8)

    def number_of(letter: bytes) -> int:
        return int(np.count_nonzero(bytes_N == letter[0]))

    if (
        number_of(b"[") + number_of(b"{") > MAX_BRACKETS
        or number_of(b":") > MAX_NAMES
        or number_of(b",") > MAX_QUERIES * dimension + MAX_COMMAS_BESIDES
    ):
        if not data.rstrip().endswith((b"]", b"}")):
            raise Refused(400, "the body is no JSON (it does not end): send a JSON object")
        raise Refused(422, f"the body holds more values than {MAX_QUERIES} queries need: ask in several requests")


def _with_control_characters(data: bytes) -> bytes | None:
    """JSON with raw control characters in its strings, rewritten as valid JSON; None for any other body.

    A shell puts such line breaks into JSON with the output of `base64`.
    """
    if not _BREAKS.search(data):
        return None
    try:
        found = json.loads(data, strict=False)
    except (ValueError, RecursionError):
        return None
    mended = json.dumps(found).encode()
    return None if _BREAKS.search(mended) else mended


def explain_problems(problems: Sequence[Any], kind: type[BaseModel] | None = None) -> Refused:
    """The refusal of an invalid request, as a sentence made from the problems that pydantic reports."""

    # An unknown field comes before the missing field that it may stand for. A field of several types gives a problem
    # for each type; the most specific one is chosen, not the one that reports another type.
    def says(found: Any) -> tuple[bool, bool, int]:
        return found["type"] == "extra_forbidden", not found["type"].endswith("_type"), len(found["loc"])

    problem = max(problems, key=says)
    place = slips.place_of(problem["loc"])
    field = slips.shorten(place[0]) if place else None
    if problem["type"] == "extra_forbidden" and place:
        return Refused(422, slips.unknown_field(kind, place[0], problem.get("input")), field)
    if problem["type"] == "missing":
        return Refused(422, f"{field} is missing: give it", field)
    if problem["type"] == "list_type" and field is not None:
        return Refused(422, slips.alone_for_list(field, problem.get("input")), field)
    if problem["type"] in {"too_long", "too_short"} and _is_of_queries(problem, kind):
        many = slips.too_many(field, MAX_QUERIES)
        if many is not None:
            return Refused(422, many, field)
    said = problem["msg"][:1].lower() + problem["msg"][1:]
    return Refused(422, f"{field if field is not None else 'the body'} is wrong: {said}", field)


def _is_of_queries(problem: Any, kind: type[BaseModel] | None) -> bool:
    """Whether the list of wrong length is a list of queries."""
    of_questions = not slips.place_of(problem["loc"])
    too_many = problem.get("ctx", {}).get("max_length") == MAX_QUERIES
    return of_questions or (too_many and kind is not None and issubclass(kind, Asking))
