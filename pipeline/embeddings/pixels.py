"""Turns the bytes of an image file into the pixels for an encoder, and into the fields that its entry stores."""

from dataclasses import dataclass

import numpy as np

from pipeline.embeddings.preprocessing import pixels_of, shortest_of
from pipeline.images.decoding.decode import decode
from pipeline.images.decoding.thumbnails import thumbnail
from pipeline.store.tables.identity import Preprocessing


@dataclass(frozen=True)
class ImageFacts:
    """The fields that an entry stores about its image file.

    `width` and `height` are in pixels as displayed; `thumbnail` is None if not asked for.
    """

    sha256: str
    width: int
    height: int
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Pixels:
    """One image ready for the encoder: uint8 [S, S, 3]."""

    pixels_SS3: np.ndarray
    facts: ImageFacts


def pixels_of_bytes(
    data: bytes, preprocessing: Preprocessing, *, thumbnails: bool = False, most: int | None = None
) -> Pixels:
    """Decode, resize and crop the bytes of an image file.

    Raises Rejected, and Heavy if decoding would cost more than `most` pixels.
    """
    decoded = decode(data, shortest_of(preprocessing), most)
    small = thumbnail(decoded.image) if thumbnails else None
    facts = ImageFacts(decoded.sha256, decoded.width, decoded.height, small)
    return Pixels(pixels_of(decoded.image, preprocessing), facts)
