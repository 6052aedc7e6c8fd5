"""What a server does to its memory: one writer, which holds the encoder once an image is added."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pipeline.visual_memory import VisualMemory


class Editor:
    """The memory at a URI, changed in one process so that its own commits do not race each other."""

    def __init__(self, uri: str) -> None:
        self._memory = VisualMemory(uri)

    def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict:
        """Do what a request asked for; what was done as a JSON object. Raises VisualMemoryError."""
        verbs: dict[str, Callable[..., dict]] = {"add": self._add, "forget": self._forget, "relabel": self._relabel}
        return verbs[verb](**arguments)

    def _add(self, image: bytes, label: str | None, uri: str | None, dataset: str) -> dict:
        uris = None if uri is None else [uri]
        [entry_id] = self._memory.add_images(
            [image], labels=[label], uris=uris, dataset=dataset, command="POST entries"
        )
        return {"id": entry_id, "version": self._memory.log.latest().version}

    def _forget(self, ids: list[int], uris: list[str], labels: list[str], datasets: list[str], *, erase: bool) -> dict:
        report = self._memory.forget(
            ids=ids, uris=uris, labels=labels, datasets=datasets, erase=erase, command="POST forget"
        )
        return report.to_json()

    def _relabel(self, ids: list[int], label: str, label_set: str | None) -> dict:
        report = self._memory.relabel(ids=ids, label=label, label_set=label_set, command="POST relabel")
        return report.to_json()
