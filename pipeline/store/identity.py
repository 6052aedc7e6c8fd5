"""What makes two vectors comparable: encoder, weights, preprocessing and dimension.

A version names exactly one identity. Its fingerprint stands in the metadata of every Parquet file of entries.
"""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

PixelPath = Literal["pillow", "pillow-draft"]


class Preprocessing(BaseModel):
    """From decoded RGB pixels to the encoder's input; every field changes the vectors.

    `resize` is the length in pixels of the shorter side before the centre crop of `crop` x `crop` pixels; with
    `crop_mode` "squash" both sides become `resize`, whatever the image's shape. `pixel_path` names the decoding and
    resampling code, so that a faster path which drifts becomes another identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int
    crop: int
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pixel_path: PixelPath = "pillow"


class Identity(BaseModel):
    """One encoder as used: `weights_sha256` is over tensors in name order, `dimension` the length of a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    weights_sha256: str
    preprocessing: Preprocessing
    dimension: int

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the identity's canonical JSON."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def weights_path(self) -> str:
        """Where in the memory the weights lie."""
        return f"encoder/{self.weights_sha256}.safetensors"

    def __str__(self) -> str:
        pixels = self.preprocessing
        scaled = ", decoding scaled" if pixels.pixel_path == "pillow-draft" else ""
        return (
            f"{self.encoder} (weights {self.weights_sha256[:12]}, resize {pixels.resize}, crop {pixels.crop}{scaled}, "
            f"{self.dimension} dimensions)"
        )
