"""The user's choice of an encoder. Separate from the encoder module, which takes seconds to import."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UsageError
from pipeline.store.tables.identity import GIVEN, PixelPath

DEFAULT_ENCODER = "vit_small_patch14_dinov2.lvd142m"

WeightsOrder = Literal["name", "positional"]
DecodingChoice = Literal["exact", "scaled"]

PIXEL_PATHS: dict[DecodingChoice, PixelPath] = {"exact": "pillow", "scaled": "pillow-draft"}


@dataclass(frozen=True)
class EncoderChoice:
    """The user's choice of an encoder; None means the memory's own, or the default for a new memory.

    A `name` of "given" or "given:NAME" names vectors that are given without an encoder. `weights` is a path or URI
    (None: timm's hub); `weights_order` says how its tensors are matched to the model's tensors. `decoding` "scaled"
    decodes large JPEG files at a fraction of their size.
    """

    name: str | None = None
    weights: str | None = None
    weights_order: WeightsOrder = "name"
    image_size: int | None = None
    decoding: DecodingChoice | None = None

    def __post_init__(self) -> None:
        if self.weights_order not in ("name", "positional"):
            raise UsageError(f"`weights_order` {self.weights_order} is unknown: give name or positional")
        if self.decoding is not None and self.decoding not in PIXEL_PATHS:
            raise UsageError(f"`decoding` {self.decoding} is unknown: give exact or scaled")
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"`image_size` {self.image_size} is not a number of pixels: give 1 or more")
        if self.is_given and (self.weights, self.image_size, self.decoding) != (None, None, None):
            raise UsageError(
                f"`encoder` {self.name} stands for vectors without an encoder, to which neither `weights` nor "
                "`image_size` nor `decoding` can belong: leave them out, or name a timm model"
            )
        if self.is_given and self.name == f"{GIVEN}:":
            raise UsageError("`encoder` given: has no name: give one after the colon, or given alone")

    @property
    def is_given(self) -> bool:
        """Whether `name` names vectors that are given without an encoder."""
        return self.name is not None and self.name.partition(":")[0] == GIVEN

    @property
    def says_nothing(self) -> bool:
        return self == EncoderChoice()
