"""The routes that change the memory. Each needs the token; the new version records the request and its client."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from pipeline.serving.access import asker
from pipeline.serving.http.answers import AddAnswer, ForgetAnswer, RelabelAnswer, ReloadAnswer, json_answer
from pipeline.serving.http.bodies import AddBody, ForgetBody, RelabelBody
from pipeline.serving.http.documentation import takes
from pipeline.serving.http.refused import Refused
from pipeline.serving.http.requests import read_entry, read_json
from pipeline.serving.service.service import Service
from pipeline.serving.tokens import carries

MAX_NAMED = 5  # values of a field that the recorded command lists
MAX_WORD = 80  # characters of each

_SECURITY: dict[str, Any] = {"security": [{"bearer": []}]}


def add_changes(app: FastAPI, service: Service, token: str | None) -> None:
    """Add the routes to an application. Without a token they refuse."""

    def check(request: Request) -> None:
        """Raise Refused if the server only reads, or the token is missing or wrong."""
        if token is None or service.editor is None:
            where = " where its ingress runs" if service.editor is not None else ""
            raise Refused(403, f"this server only reads: start it with a token{where} to change the memory")
        if not carries(request.scope, token):
            raise Refused(401, "the token is missing or wrong: send it as Authorization: Bearer TOKEN")

    @app.post(
        "/v1/entries",
        summary="Remember images; they count at once",
        operation_id="add_entries",
        response_model=AddAnswer,
        **takes(AddBody, files=True, extra=_SECURITY),
    )
    async def add(request: Request) -> Response:
        check(request)
        body, images = await read_entry(request, service)
        labels = body.labels_of(len(images))
        arguments = {"images": images, "labels": labels, "uris": body.uris_of(len(images)), "dataset": body.dataset}
        distinct = [*dict.fromkeys(label for label in labels if label is not None)]
        command = command_of(request, {"images": len(images), "label": distinct, "dataset": [body.dataset]})
        return json_answer(await service.edit("add", {**arguments, "command": command}))

    @app.post(
        "/v1/forget",
        summary="Forget entries",
        operation_id="forget",
        response_model=ForgetAnswer,
        **takes(ForgetBody, extra=_SECURITY),
    )
    async def forget(request: Request) -> Response:
        check(request)
        body = await read_json(request, ForgetBody, service)
        if not (body.ids or body.uris or body.labels or body.datasets):
            raise Refused(422, "nothing was named to forget: give ids, uris, labels or datasets", "ids")
        what: dict[str, Sequence[Any] | int] = {"ids": body.ids, "uris": len(body.uris)}
        what |= {"labels": body.labels, "datasets": body.datasets, "erase": ["true"] if body.erase else []}
        command = command_of(request, what)
        return json_answer(await service.edit("forget", {**body.model_dump(), "command": command}))

    @app.post(
        "/v1/relabel",
        summary="Correct labels",
        operation_id="relabel",
        response_model=RelabelAnswer,
        **takes(RelabelBody, extra=_SECURITY),
    )
    async def relabel(request: Request) -> Response:
        check(request)
        body = await read_json(request, RelabelBody, service)
        sets = [body.label_set] if body.label_set is not None else []
        command = command_of(request, {"ids": body.ids, "label": [body.label], "label_set": sets})
        return json_answer(await service.edit("relabel", {**body.model_dump(), "command": command}))

    @app.post(
        "/v1/reload",
        summary="Look for a newer version now",
        operation_id="reload",
        response_model=ReloadAnswer,
        openapi_extra=_SECURITY,
    )
    async def reload(request: Request) -> Response:
        check(request)
        return json_answer({"version": await service.refresh()})


def command_of(request: Request, what: Mapping[str, Sequence[Any] | int]) -> str:
    """The request and its client, as the resulting version records them.

    Uris are counted rather than named, for they may contain passwords and signatures. The token is not recorded.
    """
    words = [f"{request.method} {request.url.path}"]
    for field, values in what.items():
        if isinstance(values, int):
            words += [f"{field}={values}"] if values else []
            continue
        words += [f"{field}={shlex.quote(_short(str(value)))}" for value in values[:MAX_NAMED]]
        words += [f"and {len(values) - MAX_NAMED} more"] if len(values) > MAX_NAMED else []
    return f"{' '.join(words)} {asker() or ''}".rstrip()


def _short(text: str) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return f"{line[:MAX_WORD]}…" if len(line) > MAX_WORD else line
