"""Embeds query images as users give them. A vector does not depend on the other queries of a call."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.embeddings.apart import pixels_here_or_apart
from pipeline.embeddings.preprocessing import pixels_of
from pipeline.errors import SourceError
from pipeline.images.decoding.decode import Rejected, as_displayed
from pipeline.images.names.uris import path_of_uri, uri_of
from pipeline.images.reading.files import is_remote, read_file
from pipeline.store.tables.identity import Preprocessing

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

QueryImage = str | Path | bytes | Image.Image


def embed_images(encoder: "Encoder", images: Sequence[QueryImage]) -> tuple[np.ndarray, list[str | None]]:
    """Vectors float32 [Q, D] of unit length, and the uri of each image (None for bytes and PIL images).

    Raises SourceError naming the first image that cannot be read.
    """
    loaded = [_pixels(image, encoder.identity.pixels) for image in images]
    vectors_QD = encoder.embed_queries(np.stack([pixels for pixels, _ in loaded]))
    return vectors_QD, [uri for _, uri in loaded]


def pixels_of_query(image: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Decode the bytes of an image file to pixels uint8 [S, S, 3]. Raises Rejected."""
    return pixels_here_or_apart(image, preprocessing).pixels_SS3


def _pixels(image: QueryImage, preprocessing: Preprocessing) -> tuple[np.ndarray, str | None]:
    if isinstance(image, Image.Image):
        try:
            return pixels_of(as_displayed(image), preprocessing), None
        except (ValueError, OSError, ZeroDivisionError) as error:
            raise SourceError(f"the PIL image given cannot be used ({error}): give another") from error
    if isinstance(image, bytes):
        try:
            return pixels_here_or_apart(image, preprocessing).pixels_SS3, None
        except Rejected as rejected:
            raise SourceError(
                f"the image given as bytes cannot be used ({rejected.reason}): give another"
            ) from rejected
    if not isinstance(image, str | Path):
        raise SourceError(f"a query image is a {type(image).__name__}: give a path, bytes, or a PIL image")
    uri = uri_of(str(image))
    place = uri if is_remote(uri) else path_of_uri(uri)
    if os.path.isdir(place):
        raise SourceError(f"{place} is a folder: name image files, such as {os.path.join(str(image), '*.jpg')}")
    try:
        return pixels_here_or_apart(read_file(uri, pipes=True), preprocessing).pixels_SS3, uri
    except Rejected as rejected:
        raise SourceError(
            f"the image {place} cannot be used ({rejected.reason}): check the path or the file"
        ) from rejected
