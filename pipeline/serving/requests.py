"""Requests read: bodies of JSON and forms as models, no longer than they may be, or refused with the field.

The body is read and checked here rather than by FastAPI's parameters, which would parse it twice as slowly.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving import slips
from pipeline.serving.bodies import MAX_IMAGES, AddBody, Asking

MAX_QUERIES = 256  # in one request
MAX_PART_FIELDS = 1_000
_AS_JSON = {"application/x-www-form-urlencoded", "text/plain"}  # what curl and others call it when not told
PAIRS = {"weigh", "assume"}
_BREAKS = re.compile(rb"[\x00-\x1f]")  # which json.dumps writes as escapes
_LISTS: dict[type[BaseModel], set[str]] = {AddBody: {"label", "uri"}}  # fields that a form may have several times
_ALWAYS_LISTS = {"exclude"}

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
    if _is_form(request):
        body, files = await _of_form(request, kind)
        if files and (body.image_base64 is not None or body.embedding is not None):
            raise Refused(422, "an image file was given, and something else besides: give one of them", "image")
        return [Query(body, len(files) > 1 if files else body.is_batch, files or None)], False
    data = await _json_of(request, images=True)
    if data.lstrip()[:1] != b"[":
        body = checked(kind, data, images=True)
        return [Query(body, body.is_batch)], False
    bodies = checked(TypeAdapter(list[kind]), data, kind, images=True)  # type: ignore[valid-type]
    if not 1 <= len(bodies) <= MAX_QUERIES:
        raise Refused(422, f"the list has {len(bodies):,} questions: give 1 to {MAX_QUERIES}")
    return [Query(body, body.is_batch) for body in bodies], True


async def added(request: Request) -> tuple[AddBody, list[bytes]]:
    """What is to be remembered, and the images. Raises SourceError for what is no base64."""
    if _is_form(request):
        body, images = await _of_form(request, AddBody)
    else:
        body, images = checked(AddBody, await _json_of(request, images=True), images=True), []
    if images and body.image_base64 is not None:
        raise Refused(422, "an image file was given, and image_base64 besides: give one of them", "image")
    images = images or body.images
    if not images:
        raise Refused(422, f"there is no image: give image_base64, or a file ({slips.AS_FORM})", "image_base64")
    if len(images) > MAX_IMAGES:
        raise Refused(422, f"{len(images):,} images are many for one request: give at most {MAX_IMAGES}", "image")
    return body, images


async def stated(request: Request, kind: type[Body]) -> Body:
    """A body that has no images in it."""
    body: Body = checked(kind, await _json_of(request, images=False))
    return body


def checked(kind: Any, data: bytes, of: type[BaseModel] | None = None, *, images: bool = False) -> Any:
    """A JSON body as a model, or a list of them; `of` is then the model."""
    if not data:
        raise Refused(400, "the body is empty: send JSON")
    try:
        if isinstance(kind, TypeAdapter):
            return kind.validate_json(data)
        return kind.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        if problems[0]["type"] == "json_invalid":
            mended = _with_control_characters(data)
            if mended is not None:
                return checked(kind, mended, of, images=images)
            raise Refused(400, slips.no_json(data, problems[0]["msg"], images=images)) from None
        raise told(problems, of or kind) from None


def _with_control_characters(data: bytes) -> bytes | None:
    """JSON in whose strings lines are broken, as a shell does with the output of `base64`, as JSON; None for other."""
    try:
        found = json.loads(data, strict=False)
    except (ValueError, RecursionError):
        return None
    return json.dumps(found).encode() if _BREAKS.search(data) else None


def told(problems: Sequence[Any], kind: type[BaseModel] | None = None) -> Refused:
    """What is wrong with a request as a sentence, from the problems that pydantic found."""

    # A name that is not quite right comes before what is missing for it. Of the problems that each form of a field has,
    # the one that says most: not that it has another form.
    def says(found: Any) -> tuple[bool, bool, int]:
        return found["type"] == "extra_forbidden", not found["type"].endswith("_type"), len(found["loc"])

    problem = max(problems, key=says)
    place = slips.place_of(problem["loc"])
    field = place[0] if place else None
    if problem["type"] == "extra_forbidden" and field is not None:
        return Refused(422, slips.unknown_field(kind, field, problem.get("input")), field)
    if problem["type"] == "missing":
        return Refused(422, f"{field} is missing: give it", field)
    if problem["type"] == "list_type" and field is not None:
        return Refused(422, slips.alone_for_list(field, problem.get("input")), field)
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


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


def _is_form(request: Request) -> bool:
    return _content_type(request) == "multipart/form-data"


async def _json_of(request: Request, *, images: bool) -> bytes:
    """The body of a request that should be JSON."""
    content_type = _content_type(request)
    if content_type and not content_type.endswith("json") and content_type not in _AS_JSON:
        raise Refused(415, slips.type_not_taken(content_type, images=images))
    data = await request.body()
    if content_type in _AS_JSON and slips.is_image(data):
        raise Refused(415, slips.no_json(data, "", images=images))
    return data


async def _of_form(request: Request, kind: type[Body]) -> tuple[Body, list[bytes]]:
    """A body as a form: the file(s) `image`, and options as text fields, those with pairs as ID=VALUE."""
    try:
        form = await request.form(max_files=MAX_QUERIES, max_fields=MAX_PART_FIELDS)
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read ({error.detail}): send multipart/form-data") from None
    fields: dict[str, Any] = {}
    images: list[UploadFile] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise Refused(422, f"the file {slips.shown(name)} is not asked for: name it image", name)
            images.append(value)
        elif name == "image":
            raise Refused(422, slips.image_as_text(value), name)
        else:
            _put(fields, name, value, may_repeat=name in _LISTS.get(kind, ()))
    body = _validated(kind, fields)
    contents = [await image.read() for image in images]
    if not all(contents):
        raise Refused(422, "the image is empty: send an image file", "image")
    return body, contents


def _put(fields: dict[str, Any], name: str, text: str, *, may_repeat: bool) -> None:
    """A text field of a form among those of a body."""
    if name in _ALWAYS_LISTS:
        fields.setdefault(name, []).append(text)
    elif name in PAIRS:
        entry_id, _, said = text.partition("=")
        fields.setdefault(name, {})[entry_id] = said
    elif name not in fields:
        fields[name] = _from_json(name, text) if name == "embedding" else text
    elif may_repeat:
        given = fields[name]
        fields[name] = [*given, text] if isinstance(given, list) else [given, text]
    else:
        raise Refused(422, f"{name} was given twice: give it once", name)


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Refused(422, f"{name} is no JSON: write it as in a JSON body", name) from None


def _validated(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    try:
        return kind.model_validate(fields, strict=False)
    except ValidationError as error:
        raise told(error.errors(include_url=False), kind) from None
