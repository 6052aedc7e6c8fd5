"""The HTTP face of a service: requests checked, answers as JSON, refusals as one sentence with the field.

Bodies are read in `requests.py`; what FastAPI is told of them here is for the OpenAPI document.
"""

import asyncio
import hmac
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

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
from pipeline.serving.requests import MAX_QUERIES, PAIRS, BodyLimit, Query, Refused, asked, checked, told
from pipeline.serving.service import Service

BACKLOG = 2_048  # connections that wait to be taken

Body = TypeVar("Body", bound=BaseModel)

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
    app.add_middleware(BodyLimit, max_bytes=service.limits.body_bytes)

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
        refusal = told(error.errors())
        return _refusal(service, refusal.status, refusal.detail, refusal.field)

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
        questions, many = await asked(request, SearchBody)
        answers = await asyncio.gather(*(_search(service, question) for question in questions))
        service.meter.took("request", time.monotonic() - began)
        return _json(answers if many else answers[0])

    @app.post(
        "/v1/classify", summary="Decisions, with their evidence", **_takes(ClassifyBody, DecisionAnswer, lists=True)
    )
    async def classify(request: Request) -> Response:
        began = time.monotonic()
        questions, many = await asked(request, ClassifyBody)
        answers = await asyncio.gather(*(_classify(service, question) for question in questions))
        service.meter.took("request", time.monotonic() - began)
        return _json(answers if many else answers[0])

    @app.post("/knn-service", summary="For clients of clip-retrieval", **_takes(KnnBody, list[dict[str, Any]]))
    async def knn_service(request: Request) -> Response:
        body = checked(KnnBody, await request.body())
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
            body = checked(kind, await request.body())
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


async def _search(service: Service, question: "Query[SearchBody]") -> Any:
    vectors_QD = await _vectors(service, question)
    searched = await service.search(vectors_QD, question.body.k, question.body.how)
    common = {
        "version": searched.version,
        "shards_answered": searched.shards_answered,
        "shards_total": searched.shards_total,
        "partial": searched.partial,
    }
    answers = [{"neighbors": [n.to_json() for n in neighbors], **common} for neighbors in searched.neighbors]
    return answers if question.is_batch else answers[0]


async def _classify(service: Service, question: "Query[ClassifyBody]") -> Any:
    vectors_QD = await _vectors(service, question)
    decided = await service.classify(vectors_QD, question.body.options, question.body.how)
    answers = [decision.to_json() | {"partial": decided.partial} for decision in decided.decisions]
    return answers if question.is_batch else answers[0]


async def _vectors(service: Service, question: "Query[Any]") -> np.ndarray:
    body: Asking = question.body
    if question.files is None:
        if body.embedding is None and body.image_base64 is None:
            raise Refused(422, "there is nothing to ask about: give image_base64 or embedding", "image_base64")
        if body.embedding is not None and body.image_base64 is not None:
            raise Refused(422, "both image_base64 and embedding were given: give one of them", "embedding")
    given = body.vectors_QD
    images = question.files if question.files is not None else body.images
    if len(images) > MAX_QUERIES or (given is not None and len(given) > MAX_QUERIES):
        field = "image_base64" if images else "embedding"
        raise Refused(422, f"more than {MAX_QUERIES} queries are too many for one request: ask in batches", field)
    if given is not None:
        return service.unit_vectors(given)
    return await service.embed(images, body.how.timeout_seconds)


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
        form = {name: part for name, part in properties.items() if name not in {"image_base64", "embedding", *PAIRS}}
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
