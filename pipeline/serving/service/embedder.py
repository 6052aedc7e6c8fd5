"""Embeds the images of many requests: decodes them in parallel, and embeds them together."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.embeddings.apart import Apart, TooLate
from pipeline.embeddings.loading import open_encoder
from pipeline.embeddings.pixels import pixels_of_bytes
from pipeline.errors import SourceError, Unavailable, VisualMemoryError
from pipeline.images.decoding.decode import Heavy, Rejected
from pipeline.resources import available_cpus
from pipeline.serving.service.image_queue import LARGE_PIXELS
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.interface import Storage

SMALL_PIXELS = 1_000_000  # an image up to this size is decoded in a thread, even with `apart`: 25 ms
NICENESS = 10  # of processes that decode large images, so that small images get the cores first


class Embedder:
    """The encoder of a memory. Processes decode expensive images; they are killed at the deadline."""

    def __init__(self, storage: Storage) -> None:
        identity = VersionLog(storage).latest().identity
        if identity is None:
            raise SourceError(f"the memory at {storage.uri} has no entries yet: add images first")
        self._encoder = open_encoder(storage, identity)
        cpus = max(available_cpus(), 1)
        self._decoding = ThreadPoolExecutor(cpus, thread_name_prefix="decode")
        processes = max(cpus // 2, 1)
        self._processes = Apart(processes, NICENESS)
        self._asking = ThreadPoolExecutor(processes, thread_name_prefix="apart")  # each waits for one process
        self._model = threading.Lock()
        self.embed([])

    def embed(
        self, images: Sequence[bytes], seconds: float | None = None, *, apart: bool = False
    ) -> list[np.ndarray | VisualMemoryError]:
        """For each image file a vector (float32 [D], unit length) or the error.

        A vector has the same bits as if its image were embedded alone. After `seconds` no work begins, and decoding
        that processes have begun is stopped. With `apart` processes decode every image that is not small.
        """
        until = None if seconds is None else time.monotonic() + seconds
        most = SMALL_PIXELS if apart else LARGE_PIXELS
        loaded = list(self._decoding.map(lambda image: self._pixels(image, most, until), images))
        if any(found is None for found in loaded):
            waiting = [
                self._asking.submit(self._pixels_apart, image, until) if found is None else None
                for image, found in zip(images, loaded, strict=True)
            ]
            loaded = [
                found if future is None else future.result() for found, future in zip(loaded, waiting, strict=True)
            ]
        pixels = [found for found in loaded if isinstance(found, np.ndarray)]
        with self._model:
            vectors = iter(self._encoder.embed_queries(np.stack(pixels))) if pixels else iter(())
        return [next(vectors) if isinstance(found, np.ndarray) else found for found in loaded if found is not None]

    def _pixels(self, image: bytes, most: int, until: float | None) -> np.ndarray | VisualMemoryError | None:
        """The pixels of an image, or the error; None if decoding costs more than `most`."""
        if until is not None and time.monotonic() > until:
            return _too_late()
        try:
            return pixels_of_bytes(image, self._encoder.identity.pixels, most=most).pixels_SS3
        except Heavy:
            return None
        except Rejected as rejected:
            return _refusal(rejected)
        except VisualMemoryError as error:
            return error

    def _pixels_apart(self, image: bytes, until: float | None) -> np.ndarray | VisualMemoryError:
        seconds = None if until is None else until - time.monotonic()
        if seconds is not None and seconds <= 0:
            return _too_late()
        try:
            return self._processes.pixels_of_bytes(image, self._encoder.identity.pixels, seconds=seconds).pixels_SS3
        except TooLate:
            return _too_late()
        except Rejected as rejected:
            return _refusal(rejected)


def _refusal(rejected: Rejected) -> SourceError:
    return SourceError(f"the image cannot be used ({rejected.reason}): send another")


def _too_late() -> Unavailable:
    return Unavailable("the image was not decoded in time: send it smaller, or ask again later")
