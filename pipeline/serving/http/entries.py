"""The routes that show one entry and its picture."""

import asyncio

from fastapi import FastAPI, Path, Request
from fastapi.responses import Response

from pipeline.errors import Overloaded, UnknownName
from pipeline.serving.http.answers import EntryAnswer, json_answer
from pipeline.serving.http.bodies import MAX_ID
from pipeline.serving.http.pictures import Pictures
from pipeline.serving.http.refused import Refused
from pipeline.serving.http.slips import in_fields
from pipeline.serving.http.waiting import client_left
from pipeline.serving.service.group import Entry
from pipeline.serving.service.service import Service

LARGEST_EXACT = (1 << 53) - 1  # beyond it a float, as JavaScript uses, cannot hold every whole number
LOOKED_UP_AT_ONCE = 4  # lookups at once; questions get most of a group's calls
LOOKED_UP_LATER = 256
FIELDS = ("id", "uri", "label", "dataset", "width", "height", "sha256", "kept")


def add_entries(app: FastAPI, service: Service, pictures: Pictures) -> None:
    """Add the routes to an application."""
    entry_id = Path(ge=0, le=MAX_ID, description="As `search` shows it.")

    turns = _Turns(LOOKED_UP_AT_ONCE, LOOKED_UP_LATER)

    async def found(given: int) -> Entry:
        try:
            async with turns:
                return await service.entry(given)
        except UnknownName as error:
            rounded = given > LARGEST_EXACT
            hint = "; JavaScript rounds ids as large as this: take them from id_text" if rounded else ""
            raise Refused(404, in_fields(str(error)) + hint, "id") from None

    @app.get("/v1/entries/{id}", summary="One entry", operation_id="get_entry", response_model=EntryAnswer)
    async def entry(id: int = entry_id) -> Response:  # noqa: A002, the word of the contract
        shown = await found(id)
        fields = {name: getattr(shown, name) for name in FIELDS}
        return json_answer(fields | {"id_text": str(shown.id), "version": service.state.version})

    @app.get(
        "/v1/entries/{id}/image",
        summary="Its image, small",
        operation_id="get_entry_image",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}, "description": "A JPEG."}},
    )
    async def image(request: Request, id: int = entry_id) -> Response:  # noqa: A002
        shown = await found(id)
        version = service.state.version
        # The browser must revalidate each time, so that it shows no forgotten entry from its cache.
        headers = {"Cache-Control": "private, no-cache", "ETag": f'"{shown.sha256[:32]}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        jpeg = await pictures.of(shown, client_left(request))
        if service.state.version != version:
            await found(id)  # raises if it was forgotten meanwhile
        if jpeg is None:  # one sentence for every reason, so that it does not reveal which files exist
            why = f"no picture of entry {id} can be shown: none is kept with it, and its source gives none"
            raise Refused(404, f"{why}; put the file back as it was, or add the image again with thumbnails", "id")
        if jpeg is shown.thumbnail:
            del headers["ETag"]  # the source may come back with a larger picture
        return Response(jpeg, media_type="image/jpeg", headers=headers)


class _Turns:
    """Lets `at_once` callers in; up to `waiting` others wait. Raises Overloaded beyond that."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._left = at_once + waiting

    async def __aenter__(self) -> None:
        if not self._left:
            raise Overloaded("more entries are asked for than can be read in time: ask again later", 1.0)
        self._left -= 1
        try:
            await self._free.acquire()
        except BaseException:
            self._left += 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._free.release()
        self._left += 1
