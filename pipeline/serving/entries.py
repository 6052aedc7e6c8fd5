"""The routes that show one entry, and its picture."""

import asyncio

from fastapi import FastAPI, Path
from fastapi.responses import Response

from pipeline.errors import UnknownName
from pipeline.serving.answers import EntryAnswer, json_answer
from pipeline.serving.bodies import MAX_ID
from pipeline.serving.group import Entry
from pipeline.serving.pictures import picture_of
from pipeline.serving.refused import Refused
from pipeline.serving.service import Service
from pipeline.serving.slips import in_fields

LARGEST_EXACT = (1 << 53) - 1  # beyond it a float, and so a number of JavaScript, is no longer every whole number
FIELDS = ("id", "uri", "label", "dataset", "width", "height", "sha256", "kept")


def add_entries(app: FastAPI, service: Service) -> None:
    """Put the routes into an application."""
    entry_id = Path(ge=0, le=MAX_ID, description="As `search` shows it.")

    async def found(given: int) -> Entry:
        try:
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
    async def image(id: int = entry_id) -> Response:  # noqa: A002
        jpeg = await asyncio.to_thread(picture_of, await found(id))
        if jpeg is None:
            why = f"the image of entry {id} is not kept, and its source is gone or changed"
            raise Refused(404, f"{why}: put it back, or add the image again with thumbnails", "id")
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})
