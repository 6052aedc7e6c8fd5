"""Images of many requests, decoded side by side and embedded together."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.parts import available_cpus
from pipeline.embeddings.queries import pixels_of_query
from pipeline.errors import SourceError, VisualMemoryError
from pipeline.images.decode import Rejected, dimensions
from pipeline.store.storage import Storage
from pipeline.store.versions import VersionLog


class Embedder:
    """The encoder of a memory. Images of more than `max_pixels` are refused before they are decoded."""

    def __init__(self, storage: Storage, max_pixels: int) -> None:
        identity = VersionLog(storage).latest().identity
        if identity is None:
            raise SourceError(f"the memory at {storage.uri} has no entries yet: add images first")
        self._encoder = Encoder.open(storage, identity)
        self._max_pixels = max_pixels
        self._decoding = ThreadPoolExecutor(max(available_cpus(), 1))
        self.embed([])

    def embed(self, images: Sequence[bytes]) -> list[np.ndarray | VisualMemoryError]:
        """A vector float32 [D] of unit length for each image file, or why there is none.

        The same bits as when it is asked about alone.
        """
        loaded = list(self._decoding.map(self._pixels, images))
        pixels = [found for found in loaded if isinstance(found, np.ndarray)]
        vectors = iter(self._encoder.embed_queries(np.stack(pixels))) if pixels else iter(())
        return [next(vectors) if isinstance(found, np.ndarray) else found for found in loaded]

    def _pixels(self, image: bytes) -> np.ndarray | VisualMemoryError:
        try:
            width, height = dimensions(image)
            if width * height > self._max_pixels:
                return SourceError(
                    f"the image has {width:,} x {height:,} pixels, and {self._max_pixels:,} are taken: send it smaller"
                )
            return pixels_of_query(image, self._encoder.identity.pixels)
        except Rejected as rejected:
            return SourceError(f"the image cannot be used ({rejected.reason}): send another")
        except VisualMemoryError as error:
            return error
