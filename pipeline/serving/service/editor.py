"""Changes to the memory of a server: a single writer, which loads the encoder when the first image is added."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pipeline.errors import SourceError
from pipeline.serving.service.image_queue import ImageLimits, works_of
from pipeline.visual_memory import VisualMemory

MAX_DUPLICATES = 1_000  # of erased entries, listed in an answer


class Editor:
    """Edits the memory at a URI from one process, so that its own commits do not conflict with each other.

    Images beyond the limits are refused before they are decoded. With `thumbnails` each added image stores a thumbnail,
    because bytes that came over HTTP have no file to read again.
    """

    def __init__(self, uri: str, limits: ImageLimits, *, thumbnails: bool = True) -> None:
        self._memory = VisualMemory(uri)
        self._limits = limits
        self._thumbnails = thumbnails

    def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict:
        """Carry out the edit of a request. Returns its report as a JSON object. Raises VisualMemoryError."""
        verbs: dict[str, Callable[..., dict]] = {"add": self._add, "forget": self._forget, "relabel": self._relabel}
        return verbs[verb](**arguments)

    def _add(
        self, images: list[bytes], labels: list[str | None], uris: list[str | None], dataset: str, command: str
    ) -> dict:
        try:
            works_of(images, self._limits)
        except SourceError as error:
            error.field = "image"
            raise
        ids = self._memory.add_images(
            images, labels=labels, uris=uris, dataset=dataset, thumbnails=self._thumbnails, command=command
        )
        texts = [str(entry_id) for entry_id in ids]
        version = self._memory.log.latest().version
        return {"id": ids[0], "id_text": texts[0], "ids": ids, "ids_text": texts, "version": version}

    def _forget(self, *, command: str, **named: Any) -> dict:
        report = self._memory.forget(**named, command=command).to_json()
        found = report["live_duplicates"]
        duplicates = [{**duplicate, "id_text": str(duplicate["id"])} for duplicate in found[:MAX_DUPLICATES]]
        return report | {"live_duplicates": duplicates, "num_live_duplicates": len(found)}

    def _relabel(self, *, command: str, **named: Any) -> dict:
        return self._memory.relabel(**named, command=command).to_json()
