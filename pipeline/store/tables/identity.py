"""What makes two vectors comparable: encoder, weights, preprocessing and dimension.

A version names exactly one identity. Every Parquet file of entries has its fingerprint in the metadata.

Vectors that were given without an encoder have an identity too: a name, which distinguishes them from other vectors.
"""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import EncoderError
from pipeline.store.layout import weights_path
from pipeline.store.values import MAX_DIMENSION, MAX_PIXELS, Finite, Sha256

GIVEN = "given"  # the encoder of vectors that were given without one; "given:NAME" has a name
NO_WEIGHTS = "0" * 64

PixelPath = Literal["pillow", "pillow-draft"]


class Preprocessing(BaseModel):
    """From decoded RGB pixels to the encoder's input; every field changes the vectors.

    `resize` is the length in pixels of the shorter side before the centre crop of `crop` x `crop` pixels. With
    `crop_mode` "squash" both sides become `resize`, whatever the image's shape. `pixel_path` names the decoding and
    resampling code: a faster path with slightly different pixels is another identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int = Field(ge=1, le=MAX_PIXELS)
    crop: int = Field(ge=1, le=MAX_PIXELS)
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"]
    mean: tuple[Finite, Finite, Finite]
    std: tuple[Finite, Finite, Finite]
    pixel_path: PixelPath = "pillow"


class Identity(BaseModel):
    """One encoder as used: `weights_sha256` hashes tensors in name order, `dimension` is the length of a vector.

    `preprocessing` is None for vectors that were given without an encoder, which cannot embed an image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    weights_sha256: Sha256
    preprocessing: Preprocessing | None
    dimension: int = Field(ge=1, le=MAX_DIMENSION)

    @classmethod
    def of_given(cls, name: str, dimension: int) -> "Identity":
        """The identity of vectors given without an encoder, under the name "given" or "given:NAME"."""
        return cls(encoder=name, weights_sha256=NO_WEIGHTS, preprocessing=None, dimension=dimension)

    @property
    def is_given(self) -> bool:
        """Whether its vectors were given without an encoder, so that no image can be embedded."""
        return self.preprocessing is None

    @property
    def pixels(self) -> Preprocessing:
        """The preprocessing of an encoder. Raises EncoderError for vectors that were given without one."""
        if self.preprocessing is None:
            raise EncoderError(
                f"no image can be embedded where the vectors were given without an encoder ({self.encoder}): ask with "
                "a source of vectors (`classify --out`, `evaluate`), or name the encoder when adding them to a new "
                "memory (`add --encoder`)"
            )
        return self.preprocessing

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the identity's canonical JSON."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def weights_path(self) -> str:
        """The path of the weights in the memory."""
        return weights_path(self.weights_sha256)

    def __str__(self) -> str:
        pixels = self.preprocessing
        if pixels is None:
            return f"{self.encoder} (vectors without an encoder, {self.dimension} dimensions)"
        scaled = ", decoding scaled" if pixels.pixel_path == "pillow-draft" else ""
        return (
            f"{self.encoder} (weights {self.weights_sha256[:12]}, resize {pixels.resize}, crop {pixels.crop}{scaled}, "
            f"{self.dimension} dimensions)"
        )
