"""The HTTP face of a service: requests checked, answers as JSON, refusals as one sentence with the field.

The body is read and checked here rather than by FastAPI's parameters, which would parse it twice as slowly; what
FastAPI is told of it is for the OpenAPI document.
"""

import asyncio
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import (
    CommitConflict,
    EncoderError,
    Overloaded,
    SourceError,
    Unavailable,
    UnknownName,
    UsageError,
    VisualMemoryError,
)
from pipeline.serving.bodies import (
    MAX_ID,
    AddBody,
    Asking,
    ClassifyBody,
    DecisionAnswer,
    EntryAnswer,
    ForgetBody,
    KnnBody,
    Refusal,
    RelabelBody,
    SearchAnswer,
    SearchBody,
    decoded,
)
from pipeline.serving.pictures import picture_of
from pipeline.serving.service import Service

MAX_QUERIES = 256  # in one request
MAX_PART_FIELDS = 100
BACKLOG = 2_048  # connections that wait to be taken

Body = TypeVar("Body", bound=BaseModel)

_LISTS = {"exclude"}
_AS_JSON = {"application/x-www-form-urlencoded", "text/plain"}  # what curl and others call it when not told
_PAIRS = {"weigh", "assume"}
_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (Overloaded, 429),
    (Unavailable, 503),
    (UnknownName, 422),
    (UsageError, 422),
    (SourceError, 422),
    (EncoderError, 422),
    (CommitConflict, 409),
    (VisualMemoryError, 503),
)


class Refused(Exception):
    """A request that is answered with a status, a sentence and the field it is about."""

    def __init__(self, status: int, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.field = status, detail, field


def make_app(service: Service, token: str | None = None, listen: tuple[str, int] | None = None) -> FastAPI:
    """The application. Without a token nothing that changes the memory can be asked for.

    With `listen`, a host and a port, it also listens there itself from its start to its end.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        async with listening(app, *listen) if listen is not None else nullcontext():
            yield
        await service.stop()

    app = FastAPI(
        title="Visual Memory",
        version="1",
        description="A classifier that is a database: ask, see the evidence, add, correct, forget.",
        lifespan=lifespan,
        responses={code: {"model": Refusal, "description": text} for code, text in _REFUSALS.items()},
    )
    app.add_middleware(_BodyLimit, max_bytes=service.limits.body_bytes)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(service, error.status, error.detail, error.field)

    @app.exception_handler(VisualMemoryError)
    async def failed(_: Request, error: VisualMemoryError) -> Response:
        status = next(code for kind, code in _STATUSES if isinstance(error, kind))
        retry = error.retry_seconds if isinstance(error, Unavailable) else 1.0
        return _refusal(service, status, str(error), error.field, retry)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> Response:
        told = _told(error.errors())
        return _refusal(service, told.status, told.detail, told.field)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        return _refusal(service, error.status_code, str(error.detail), headers=error.headers)

    _add_questions(app, service)
    _add_entries(app, service)
    _add_edits(app, service, token)

    @app.get("/v1/status", summary="What is served", response_model=dict[str, Any])
    async def status() -> Response:
        return _json(service.status())

    @app.get("/healthz", summary="Whether questions are answered", response_model=dict[str, Any])
    async def healthz() -> Response:
        if not service.healthy:
            raise Unavailable("no part of the memory answers just now")
        return _json({"healthy": True, "version": service.state.version})

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    return app


@asynccontextmanager
async def listening(app: ASGIApp, host: str, port: int) -> AsyncIterator[None]:
    """Answer at an address until the block ends. Several processes may listen at the same one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    config = uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    with socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


def _add_questions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/search", summary="The nearest entries", **_takes(SearchBody, SearchAnswer, lists=True))
    async def search(request: Request) -> Response:
        began = time.monotonic()
        bodies, many = await _asked(request, SearchBody)
        answers = await _all(_search(service, body) for body in bodies)
        service.meter.took("request", time.monotonic() - began)
        return _json(answers if many else answers[0])

    @app.post(
        "/v1/classify", summary="Decisions, with their evidence", **_takes(ClassifyBody, DecisionAnswer, lists=True)
    )
    async def classify(request: Request) -> Response:
        began = time.monotonic()
        bodies, many = await _asked(request, ClassifyBody)
        answers = await _all(_classify(service, body) for body in bodies)
        service.meter.took("request", time.monotonic() - began)
        return _json(answers if many else answers[0])

    @app.post("/knn-service", summary="For clients of clip-retrieval", **_takes(KnnBody, list[dict[str, Any]]))
    async def knn_service(request: Request) -> Response:
        body = _checked(KnnBody, await request.body())
        if body.embedding_input is not None:
            vectors_QD = service.unit_vectors(np.array([body.embedding_input], np.float64))
        elif body.image is not None:
            vectors_QD = await service.embed([decoded(body.image)])
        else:
            said = next((name for name in ("text", "image_url") if getattr(body, name)), "embedding_input")
            raise Refused(
                422, "this memory is asked with an image or an embedding: it embeds no text and fetches no URL", said
            )
        how = Asking().how
        searched = await service.search(vectors_QD, body.num_result_ids or body.num_images, how)
        return _json(
            [
                {
                    "id": neighbor.id,
                    "similarity": neighbor.similarity,
                    "url": neighbor.uri,
                    "image_path": neighbor.uri,
                    "caption": neighbor.label,
                }
                for neighbor in searched.neighbors[0][: body.num_images]
            ]
        )


def _add_entries(app: FastAPI, service: Service) -> None:
    entry_id = Path(ge=0, le=MAX_ID, description="As `search` shows it.")

    @app.get("/v1/entries/{id}", summary="One entry", response_model=EntryAnswer)
    async def entry(id: int = entry_id) -> Response:  # noqa: A002, the word of the contract
        try:
            found = await service.entry(id)
        except UnknownName as error:
            raise Refused(404, str(error), "id") from None
        fields = ("id", "uri", "label", "dataset", "width", "height", "sha256", "kept")
        return _json({name: getattr(found, name) for name in fields} | {"version": service.state.version})

    @app.get(
        "/v1/entries/{id}/image",
        summary="Its image, small",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}, "description": "A JPEG."}},
    )
    async def image(id: int = entry_id) -> Response:  # noqa: A002
        try:
            found = await service.entry(id)
        except UnknownName as error:
            raise Refused(404, str(error), "id") from None
        jpeg = await asyncio.to_thread(picture_of, found)
        if jpeg is None:
            raise Refused(404, f"the image of entry {id} is not kept, and its source is gone or changed", "id")
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})


def _add_edits(app: FastAPI, service: Service, token: str | None) -> None:
    security: dict[str, Any] = {"security": [{"bearer": []}]}

    def check(request: Request) -> None:
        """Raise Refused without the token. It is compared in constant time."""
        if token is None or service.editor is None:
            raise Refused(403, "this server only reads: start it with a token to change the memory")
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refused(401, "the token is missing or wrong: send it as Authorization: Bearer TOKEN")

    def editing(path: str, summary: str, kind: type[Body], arguments: Callable[[Body], Mapping[str, Any]]) -> None:
        verb = {"/v1/entries": "add", "/v1/forget": "forget", "/v1/relabel": "relabel"}[path]

        @app.post(path, summary=summary, name=verb, **_takes(kind, dict[str, Any], extra=security))
        async def edit(request: Request) -> Response:
            check(request)
            body = _checked(kind, await request.body())
            report = await service.edit(verb, arguments(body))  # type: ignore[arg-type]
            return _json(report)

    @app.post(
        "/v1/reload", summary="Look for a newer version now", response_model=dict[str, Any], openapi_extra=security
    )
    async def reload(request: Request) -> Response:
        check(request)
        return _json({"version": await service.refresh()})

    editing("/v1/entries", "Remember one image; it counts at once", AddBody, _to_add)
    editing("/v1/forget", "Forget entries", ForgetBody, lambda body: body.model_dump())
    editing("/v1/relabel", "Correct labels", RelabelBody, lambda body: body.model_dump())
    _declare_token(app)


def _to_add(body: AddBody) -> dict[str, Any]:
    return body.model_dump(exclude={"image_base64"}) | {"image": decoded(body.image_base64)}


async def _search(service: Service, body: SearchBody) -> Any:
    vectors_QD = await _vectors(service, body)
    searched = await service.search(vectors_QD, body.k, body.how)
    told = {
        "version": searched.version,
        "shards_answered": searched.shards_answered,
        "shards_total": searched.shards_total,
        "partial": searched.partial,
    }
    answers = [{"neighbors": [n.to_json() for n in neighbors], **told} for neighbors in searched.neighbors]
    return answers if body.is_batch else answers[0]


async def _classify(service: Service, body: ClassifyBody) -> Any:
    vectors_QD = await _vectors(service, body)
    decided = await service.classify(vectors_QD, body.options, body.how)
    answers = [decision.to_json() | {"partial": decided.partial} for decision in decided.decisions]
    return answers if body.is_batch else answers[0]


async def _vectors(service: Service, body: Asking) -> np.ndarray:
    given = body.vectors_QD
    if given is not None:
        if body.image_base64 is not None:
            raise Refused(422, "both image_base64 and embedding were given: give one of them", "embedding")
    elif body.image_base64 is None:
        raise Refused(422, "there is nothing to ask about: give image_base64 or embedding", "image_base64")
    images = body.images
    if len(images) > MAX_QUERIES or (given is not None and len(given) > MAX_QUERIES):
        field = "image_base64" if images else "embedding"
        raise Refused(422, f"more than {MAX_QUERIES} queries are too many for one request: ask in batches", field)
    if given is not None:
        return service.unit_vectors(given)
    return await service.embed(images, body.how.timeout_seconds)


async def _all(questions: Any) -> list[Any]:
    return list(await asyncio.gather(*questions))


async def _asked(request: Request, kind: type[Body]) -> tuple[list[Body], bool]:
    """The questions of a request, and whether they came as a list."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return [await _of_form(request, kind)], False
    if content_type and not content_type.endswith("json") and content_type not in _AS_JSON:
        raise Refused(415, f"{content_type} is not taken: send application/json or multipart/form-data")
    data = await request.body()
    if data.lstrip()[:1] != b"[":
        return [_checked(kind, data)], False
    bodies = _checked(TypeAdapter(list[kind]), data)  # type: ignore[valid-type]
    if not 1 <= len(bodies) <= MAX_QUERIES:
        raise Refused(422, f"the list has {len(bodies):,} questions: give 1 to {MAX_QUERIES}")
    return bodies, True


async def _of_form(request: Request, kind: type[Body]) -> Any:
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
        return body
    contents = [await image.read() for image in images]
    if not all(contents):
        raise Refused(422, "the image is empty: send an image file", "image")
    return _WithImages.of(body, contents)


def _put(fields: dict[str, Any], name: str, text: str) -> None:
    """A text field of a form among those of a body."""
    if name in _LISTS:
        fields.setdefault(name, []).append(text)
    elif name in _PAIRS:
        entry_id, _, said = text.partition("=")
        fields.setdefault(name, {})[entry_id] = said
    elif name in fields:
        raise Refused(422, f"{name} was given twice: give it once", name)
    else:
        fields[name] = _from_json(name, text) if name == "embedding" else text


class _WithImages:
    """A body whose images came as files, which need no base64."""

    def __init__(self, body: Any, images: list[bytes]) -> None:
        self._body, self.images = body, images
        self.image_base64 = "given"
        self.is_batch = len(images) > 1

    @classmethod
    def of(cls, body: Any, images: list[bytes]) -> Any:
        if body.image_base64 is not None or body.embedding is not None:
            raise Refused(422, "an image file was given, and something else besides: give one of them", "image")
        return cls(body, images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Refused(422, f"{name} is no JSON: write it as in a JSON body", name) from None


def _checked(kind: Any, data: bytes) -> Any:
    """A JSON body as a model, or a list of them."""
    if not data:
        raise Refused(400, "the body is empty: send JSON")
    try:
        if isinstance(kind, TypeAdapter):
            return kind.validate_json(data)
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _told(error.errors(include_url=False, include_input=False)) from None


def _validated(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    try:
        return kind.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _told(error.errors(include_url=False, include_input=False)) from None


def _told(problems: Sequence[Any]) -> Refused:
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


def _takes(
    kind: type[BaseModel], answer: Any, *, lists: bool = False, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What FastAPI's OpenAPI document says of a route that reads its own body."""
    schema = kind.model_json_schema()
    example = getattr(kind, "example", {})
    properties = schema.get("properties", {})
    alone = schema
    content: dict[str, Any] = {
        "application/json": {
            "schema": {"anyOf": [alone, {"type": "array", "items": alone, "minItems": 1}]} if lists else alone,
            "example": example,
        }
    }
    if lists:
        form = {name: part for name, part in properties.items() if name not in {"image_base64", "embedding", *_PAIRS}}
        file = {"type": "string", "format": "binary", "description": "An image file; several make a batch."}
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": {"image": file, **form}, "required": ["image"]}
        }
    return {
        "response_model": answer | list[answer] if lists else answer,
        "openapi_extra": {"requestBody": {"required": True, "content": content}, **(extra or {})},
    }


def _declare_token(app: FastAPI) -> None:
    """Say in the OpenAPI document what a bearer token is."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(document), status, headers, "application/json")


def _refusal(
    service: Service,
    status: int,
    detail: str,
    field: str | None = None,
    retry_seconds: float = 1.0,
    headers: Mapping[str, str] | None = None,
) -> Response:
    service.meter.refused(status)
    said = dict(headers or {})
    if status in {429, 503}:
        said["Retry-After"] = str(max(round(retry_seconds), 1))
    if status == 413:
        said["Connection"] = "close"  # or the rest of the body would be read to its end
    if status == 401:
        said["WWW-Authenticate"] = "Bearer"
    return _json({"detail": detail, "field": field}, status, said)


class _BodyLimit:
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


_REFUSALS = {
    400: "The body cannot be read.",
    401: "The token is missing or wrong.",
    403: "The server only reads.",
    404: "There is no such entry.",
    409: "Another writer came first.",
    413: "The body is too long.",
    415: "The content type is not taken.",
    422: "A field is wrong.",
    429: "Too much is asked at once: Retry-After says when to ask again.",
    503: "A part of the memory does not answer: Retry-After says when to ask again.",
}
