"""What a user may say about the encoder. Kept apart from the encoder itself, which takes seconds to import."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UsageError
from pipeline.store.identity import PixelPath

DEFAULT_ENCODER = "vit_small_patch14_dinov2.lvd142m"

WeightsOrder = Literal["name", "positional"]
DecodingChoice = Literal["exact", "scaled"]

PIXEL_PATHS: dict[DecodingChoice, PixelPath] = {"exact": "pillow", "scaled": "pillow-draft"}


@dataclass(frozen=True)
class EncoderChoice:
    """What a user may say about the encoder; None means the memory's own, or the default for a new memory.

    `weights` is a path or URI (None: timm's hub); `weights_order` says how its tensors are matched to the model's.
    `decoding` "scaled" decodes large JPEG files at a fraction of their size.
    """

    name: str | None = None
    weights: str | None = None
    weights_order: WeightsOrder = "name"
    image_size: int | None = None
    decoding: DecodingChoice | None = None

    def __post_init__(self) -> None:
        if self.weights_order not in ("name", "positional"):
            raise UsageError(f"--weights-order {self.weights_order} is unknown: give name or positional")
        if self.decoding is not None and self.decoding not in PIXEL_PATHS:
            raise UsageError(f"--decoding {self.decoding} is unknown: give exact or scaled")
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"--image-size {self.image_size} is not a number of pixels: give 1 or more")

    @property
    def says_nothing(self) -> bool:
        return self == EncoderChoice()
