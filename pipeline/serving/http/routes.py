"""The HTTP interface of a service: its routes, its refusals (one sentence and the field), and its middleware.

Bodies are read in `requests.py`; the routes are in `questions.py`, `entries.py` and `changes.py`.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

from pipeline.errors import (
    CommitConflict,
    EncoderError,
    LibraryError,
    OutOfMemory,
    Overloaded,
    SourceError,
    Unavailable,
    UnknownName,
    UsageError,
    VisualMemoryError,
)
from pipeline.images.entry_pictures import Roots
from pipeline.serving.access import HEADER, Access, Failures, WriteLine, printable, request_id, to_logger
from pipeline.serving.http.answers import (
    REFUSALS,
    ConflictRefusal,
    HealthAnswer,
    Refusal,
    StatusAnswer,
    json_answer,
    refusal,
)
from pipeline.serving.http.changes import add_changes
from pipeline.serving.http.documentation import add_documentation
from pipeline.serving.http.entries import add_entries
from pipeline.serving.http.json_bodies import explain_problems
from pipeline.serving.http.listening import Counted, Traffic
from pipeline.serving.http.pictures import Pictures
from pipeline.serving.http.questions import add_questions
from pipeline.serving.http.refused import Refused
from pipeline.serving.http.sites import Hosts, Sites
from pipeline.serving.http.slips import in_fields, without_place
from pipeline.serving.http.uploads import Uploads
from pipeline.serving.limits import HttpLimits
from pipeline.serving.options import ANY_ORIGIN, check_origins
from pipeline.serving.service.service import Service
from pipeline.serving.tokens import carries

SECONDS_A_PREFLIGHT_HOLDS = 600

logger = logging.getLogger(__name__)

_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (Overloaded, 429),
    (Unavailable, 503),
    (UnknownName, 422),
    (UsageError, 422),
    (SourceError, 422),
    (EncoderError, 422),
    (CommitConflict, 409),
    (OutOfMemory, 503),
    (LibraryError, 500),
    (VisualMemoryError, 503),
)
_OF_THE_SERVER: dict[type[Exception], str] = {  # what is said without a token: messages name files and machines
    OutOfMemory: "the server has too little memory for this request",
    LibraryError: "the server failed at this request",
    VisualMemoryError: "a part of the memory cannot be read",
}


def make_app(
    service: Service,
    token: str | None = None,
    listen: tuple[str, int] | None = None,
    *,
    cors: Sequence[str] = (),
    hosts: Sequence[str] = (),
    limits: HttpLimits = HttpLimits(),
    access: WriteLine | None = to_logger,
    pictures: Roots = (),
) -> FastAPI:
    """The application. Without a token it refuses every change of the memory.

    With `listen`, a host and a port, it also listens there itself from startup to shutdown. Pages of the origins `cors`
    may send requests. Requests may name the server by `hosts` in addition to the names of `sites.Hosts`. `access`
    receives the lines of the access log (None: no log). Images below `pictures` are shown in addition to those that
    adds have read. `app.state.drain()` accepts no new requests and waits for those under way.
    """
    traffic = Traffic()
    maker = Pictures(service.limits, pictures)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        async with traffic.listening(app, *listen, limits) if listen is not None else nullcontext():
            yield
        maker.stop()
        await service.stop()

    app = FastAPI(
        title="Visual Memory",
        version="1",
        description="A classifier that is a database: ask, see the evidence, add, correct, forget.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page needs other sites
        redoc_url=None,
        responses={
            code: {"model": ConflictRefusal if code == 409 else Refusal, "description": text}
            for code, text in REFUSALS.items()
        },
    )
    app.state.drain = traffic.drain
    sites = Hosts(hosts, listen[0] if listen is not None else None)
    app.add_middleware(Uploads, max_bytes=service.limits.body_bytes, limits=limits)
    _add_layers(app, traffic, sites, cors, access)
    _add_refusals(app, service, token)
    add_questions(app, service)
    add_entries(app, service, maker)
    add_changes(app, service, token)

    @app.get("/v1/status", summary="What is served", operation_id="get_status", response_model=StatusAnswer)
    async def status() -> Response:
        return json_answer(await service.status())

    @app.get(
        "/healthz",
        summary="Whether questions are answered",
        operation_id="get_health",
        response_model=HealthAnswer,
    )
    async def healthz() -> Response:
        return json_answer({"healthy": True, "version": service.check_health()})

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    add_documentation(app)
    return app


def _add_layers(app: FastAPI, traffic: Traffic, hosts: Hosts, cors: Sequence[str], access: WriteLine | None) -> None:
    """Add the middleware, from the innermost to the outermost."""
    app.add_middleware(Failures)
    app.add_middleware(Counted, traffic=traffic)
    if cors:
        check_origins(cors)
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*cors],
            allow_credentials=ANY_ORIGIN not in cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", HEADER],
            expose_headers=[HEADER, "Retry-After"],
            max_age=SECONDS_A_PREFLIGHT_HOLDS,
        )
    app.add_middleware(Sites, hosts=hosts, origins=cors)
    app.add_middleware(Access, write=access)


def _add_refusals(app: FastAPI, service: Service, token: str | None) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        headers = {"Connection": "close"} if error.closes else None
        return refusal(service, error.status, error.detail, error.field, headers=headers)

    @app.exception_handler(VisualMemoryError)
    async def failed(request: Request, error: VisualMemoryError) -> Response:
        kind, status = next(found for found in _STATUSES if isinstance(error, found[0]))
        retry = error.retry_seconds if isinstance(error, Unavailable) else 1.0
        said = in_fields(str(error))
        if not carries(request.scope, token):  # do not reveal paths of this machine
            said = without_place(said, service.place)
            if kind in _OF_THE_SERVER:
                logger.warning("request %s: %s", request_id(), error)
                said = f"{_OF_THE_SERVER[kind]}: the log of the server says why, under the request's id"
        reason = error.reason if isinstance(error, CommitConflict) else None
        return refusal(service, status, said, error.field, retry, reason=reason)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> Response:
        found = explain_problems(
            [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        )  # without "path"
        return refusal(service, found.status, found.detail, found.field)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code == 404:
            detail = f"there is nothing at {printable(request.url.path)}: GET /docs shows what can be asked"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            detail = f"{request.method} is not answered here: use {allowed}"
        return refusal(service, error.status_code, detail, headers=error.headers)
