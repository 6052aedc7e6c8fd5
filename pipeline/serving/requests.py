"""Requests read: bodies of JSON and forms as models, no longer than they may be, or refused with the field.

The body is read and checked here rather than by FastAPI's parameters, which would parse it twice as slowly.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.bodies import Asking

MAX_QUERIES = 256  # in one request
MAX_PART_FIELDS = 100
_LISTS = {"exclude"}
_AS_JSON = {"application/x-www-form-urlencoded", "text/plain"}  # what curl and others call it when not told
PAIRS = {"weigh", "assume"}

Body = TypeVar("Body", bound=BaseModel)
Question = TypeVar("Question", bound=Asking)


@dataclass(frozen=True)
class Query(Generic[Question]):
    """What is asked: a body, and the images that came as files, if they did. The answer to a batch is a list."""

    body: Question
    is_batch: bool
    files: list[bytes] | None = None


class Refused(Exception):
    """A request that is answered with a status, a sentence and the field it is about."""

    def __init__(self, status: int, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.field = status, detail, field


async def asked(request: Request, kind: type[Question]) -> "tuple[list[Query[Question]], bool]":
    """The questions of a request, and whether they came as a list."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return [await _of_form(request, kind)], False
    if content_type and not content_type.endswith("json") and content_type not in _AS_JSON:
        raise Refused(415, f"{content_type} is not taken: send application/json or multipart/form-data")
    data = await request.body()
    if data.lstrip()[:1] != b"[":
        body = checked(kind, data)
        return [Query(body, body.is_batch)], False
    bodies = checked(TypeAdapter(list[kind]), data)  # type: ignore[valid-type]
    if not 1 <= len(bodies) <= MAX_QUERIES:
        raise Refused(422, f"the list has {len(bodies):,} questions: give 1 to {MAX_QUERIES}")
    return [Query(body, body.is_batch) for body in bodies], True


def checked(kind: Any, data: bytes) -> Any:
    """A JSON body as a model, or a list of them."""
    if not data:
        raise Refused(400, "the body is empty: send JSON")
    try:
        if isinstance(kind, TypeAdapter):
            return kind.validate_json(data)
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise told(error.errors(include_url=False, include_input=False)) from None


def told(problems: Sequence[Any]) -> Refused:
    """What is wrong with a request as a sentence, from the problems that pydantic found."""
    # Of the problems that each form of a field has, the one that says most: not that it has another form.
    problem = max(problems, key=lambda found: (not found["type"].endswith("_type"), len(found["loc"])))
    if problem["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON ({problem['msg']}): send a JSON object")
    place = [str(part) for part in problem["loc"]]
    while place and (place[0].isdigit() or place[0] == "path"):
        place.pop(0)  # the number of a question in a list, or where a parameter stands
    field = place[0] if place else None
    if problem["type"] == "extra_forbidden":
        return Refused(422, f"{field} is not asked for: leave it out", field)
    if problem["type"] == "missing":
        return Refused(422, f"{field} is missing: give it", field)
    said = problem["msg"][:1].lower() + problem["msg"][1:]
    return Refused(422, f"{field or 'the body'} is wrong: {said}", field)


class BodyLimit:
    """Refuses a body that is too long before it is read to its end."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        told = int(length) if length.isdigit() else 0
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if max(read, told) > self._max_bytes:
                raise Refused(413, f"the body is larger than {self._max_bytes >> 20} MiB: send less at once")
            return message

        await self._app(scope, limited, send)


async def _of_form(request: Request, kind: type[Question]) -> "Query[Question]":
    """A question as a form: the file(s) `image`, and options as text fields, those with pairs as ID=VALUE."""
    try:
        form = await request.form(max_files=MAX_QUERIES, max_fields=MAX_PART_FIELDS)
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read ({error.detail}): send multipart/form-data") from None
    fields: dict[str, Any] = {}
    images: list[UploadFile] = []
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            _put(fields, name, value)
        elif name == "image":
            images.append(value)
        else:
            raise Refused(422, f"the file {name} is not asked for: name it image", name)
    body = _validated(kind, fields)
    if not images:
        return Query(body, body.is_batch)
    if body.image_base64 is not None or body.embedding is not None:
        raise Refused(422, "an image file was given, and something else besides: give one of them", "image")
    contents = [await image.read() for image in images]
    if not all(contents):
        raise Refused(422, "the image is empty: send an image file", "image")
    return Query(body, len(contents) > 1, contents)


def _put(fields: dict[str, Any], name: str, text: str) -> None:
    """A text field of a form among those of a body."""
    if name in _LISTS:
        fields.setdefault(name, []).append(text)
    elif name in PAIRS:
        entry_id, _, said = text.partition("=")
        fields.setdefault(name, {})[entry_id] = said
    elif name in fields:
        raise Refused(422, f"{name} was given twice: give it once", name)
    else:
        fields[name] = _from_json(name, text) if name == "embedding" else text


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Refused(422, f"{name} is no JSON: write it as in a JSON body", name) from None


def _validated(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    try:
        return kind.model_validate(fields, strict=False)
    except ValidationError as error:
        raise told(error.errors(include_url=False, include_input=False)) from None
