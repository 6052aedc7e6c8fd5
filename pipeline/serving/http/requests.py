"""Reads requests: turns JSON bodies and forms into models within their limits, or refuses them with the field.

The body is read and checked here rather than by FastAPI's parameters, which would parse it at half the speed.
"""

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pydantic_core
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from pipeline.serving.http import slips
from pipeline.serving.http.bodies import MAX_IMAGES, MAX_LISTED, MAX_QUERIES, AddBody, Asking
from pipeline.serving.http.json_bodies import SMALL_BYTES, check_amount, check_body, check_body_list, explain_problems
from pipeline.serving.http.refused import Refused
from pipeline.serving.limits import MAX_NEIGHBORS
from pipeline.serving.service.service import Service

MAX_PART_FIELDS = 1_000
MAX_LISTED_IN_ALL = 10 * MAX_LISTED  # in all questions of a list together
_FORM_FIELDS = "application/x-www-form-urlencoded"  # curl's default for JSON
_JSON = re.compile(r"(?:application|text)/json|[a-z0-9.!#$&^_-]+/[a-z0-9.!#$&^_+-]+\+json")
_CHARSETS = {"utf-8", "ascii", "iso8859-1", "cp1252"}  # the charsets in which browsers and programs write forms
PAIRS = {"weigh", "assume"}
_LISTS: dict[type[BaseModel], set[str]] = {AddBody: {"label", "uri"}}  # fields that a form may repeat
_ALWAYS_LISTS = {"exclude"}

Body = TypeVar("Body", bound=BaseModel)
Question = TypeVar("Question", bound=Asking)


@dataclass(frozen=True)
class Query(Generic[Question]):
    """One question: a body, and images that came as files (None if none did). The answer to a batch is a list."""

    body: Question
    is_batch: bool
    files: list[bytes] | None = None

    @property
    def num_queries(self) -> int:
        return len(self.files) if self.files is not None else self.body.num_queries


async def read_question(
    request: Request, kind: type[Question], service: Service
) -> "tuple[list[Query[Question]], bool]":
    """The questions of a request, and whether they came as a list. Raises Refused, also for too many."""
    if _is_form(request):
        body, files = await _of_form(request, kind)
        if files and (body.image_base64 is not None or body.embedding is not None):
            raise Refused(422, "an image file was given, and something else besides: give one of them", "image")
        return _within_limits([Query(body, len(files) > 1 if files else body.is_batch, files or None)]), False
    data = await _json_of(request, images=True)
    many = re.match(rb"\s*\[", data) is not None

    def read() -> list[Question]:
        if many:
            questions: list[Question] = check_body_list(kind, data, service.dimension)
            return questions
        return [check_body(kind, data, service.dimension, images=True)]

    bodies = await service.aside.run(read) if len(data) > SMALL_BYTES else read()
    return _within_limits([Query(body, body.is_batch) for body in bodies]), many


def _within_limits(queries: "list[Query[Any]]") -> "list[Query[Any]]":
    """The questions of a request. Raises Refused if together they cost more than one request may."""
    if sum(query.num_queries * query.body.k for query in queries) > MAX_NEIGHBORS:
        raise Refused(
            422, f"an answer holds at most {MAX_NEIGHBORS:,} neighbours: ask with a smaller k, or fewer queries", "k"
        )
    # Evaluating one expression may visit every entry, so a request may hold only one.
    if len({query.body.where for query in queries} - {None}) > 1:
        raise Refused(422, "the questions have several where: ask those with one where in a request", "where")
    if sum(query.body.num_listed for query in queries) > MAX_LISTED_IN_ALL:
        said = f"the questions list more than {MAX_LISTED_IN_ALL:,} ids: ask in several requests"
        raise Refused(422, said, "exclude")
    return queries


async def read_entry(request: Request, service: Service) -> tuple[AddBody, list[bytes]]:
    """The body of an add, and its images. Raises SourceError for invalid base64."""
    encoded: list[bytes] = []
    files: list[bytes] = []
    if _is_form(request):
        body, files = await _of_form(request, AddBody)
        if files and body.image_base64 is not None:
            raise Refused(422, "an image file was given, and image_base64 besides: give one of them", "image")
        encoded = body.images
    else:
        data = await _json_of(request, images=True)

        def read() -> tuple[AddBody, list[bytes]]:
            found: AddBody = check_body(AddBody, data, service.dimension, images=True)
            return found, found.images

        body, encoded = await service.aside.run(read) if len(data) > SMALL_BYTES else read()
    images = files or encoded
    if not images:
        raise Refused(422, f"there is no image: give image_base64, or a file ({slips.AS_FORM})", "image_base64")
    if len(images) > MAX_IMAGES:
        raise Refused(422, f"{len(images):,} images are many for one request: give at most {MAX_IMAGES}", "image")
    return body, images


async def read_json(request: Request, kind: type[Body], service: Service) -> Body:
    """The body of a request that carries no image file."""
    data = await _json_of(request, images=False)

    def read() -> Body:
        body: Body = check_body(kind, data, service.dimension)
        return body

    return await service.aside.run(read) if len(data) > SMALL_BYTES else read()


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


def _is_form(request: Request) -> bool:
    return _content_type(request) == "multipart/form-data"


async def _json_of(request: Request, *, images: bool) -> bytes:
    """The body of a request that should be JSON.

    The content type that `curl -d` sends is accepted too. A page of another site could send that type without a
    preflight request; `Sites` refuses such requests.
    """
    content_type = _content_type(request)
    if content_type and content_type != _FORM_FIELDS and not _JSON.fullmatch(content_type):
        raise Refused(415, slips.type_not_taken(content_type, images=images))
    data = await request.body()
    if content_type == _FORM_FIELDS and slips.is_image(data):
        raise Refused(415, slips.no_json(data, "", images=images))
    return data


async def _of_form(request: Request, kind: type[Body]) -> tuple[Body, list[bytes]]:
    """The body and files of a form: the file(s) `image`, and options as text fields; pairs are ID=VALUE."""
    _check_charset(request)
    try:
        form = await request.form(max_files=MAX_QUERIES, max_fields=MAX_PART_FIELDS)
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read ({error.detail}): send multipart/form-data") from None
    except (ValueError, LookupError) as error:  # from headers of parts, UnicodeError included
        raise Refused(400, f"the form cannot be read ({type(error).__name__}): send multipart/form-data") from None
    try:
        return await _body_of(form.multi_items(), kind)
    finally:
        await form.close()


async def _body_of(items: Sequence[tuple[str, Any]], kind: type[Body]) -> tuple[Body, list[bytes]]:
    fields: dict[str, Any] = {}
    images: list[UploadFile] = []
    for name, value in items:
        if isinstance(value, UploadFile):
            if name != "image":
                said = f"the file {slips.shorten(name)} is not asked for: name it image"
                raise Refused(422, said, slips.shorten(name))
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


def _check_charset(request: Request) -> None:
    """Raise Refused for a charset that forms do not use: Python has codecs that take minutes, or fail."""
    found = re.search(r";\s*charset\s*=\s*\"?([^\";]*)", request.headers.get("content-type", ""), re.IGNORECASE)
    if found is None:
        return
    try:
        known = codecs.lookup(found[1].strip()).name in _CHARSETS
    except (LookupError, ValueError):
        known = False
    if not known:
        raise Refused(415, f"a form in {slips.shorten(found[1])} is not taken: send it in UTF-8")


def _put(fields: dict[str, Any], name: str, text: str, *, may_repeat: bool) -> None:
    """Put a text field of a form into the fields of a body."""
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
        raise Refused(422, f"{slips.shorten(name)} was given twice: give it once", slips.shorten(name))


def _from_json(name: str, text: str) -> Any:
    data = text.encode(errors="replace")
    try:
        check_amount(data, dimension=0)
        return pydantic_core.from_json(data)
    except (Refused, ValueError):
        raise Refused(422, f"{name} is no JSON: write it as in a JSON body", name) from None


def _validated(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    try:
        return kind.model_validate(fields, strict=False)
    except ValidationError as error:
        raise explain_problems(error.errors(include_url=False), kind) from None
