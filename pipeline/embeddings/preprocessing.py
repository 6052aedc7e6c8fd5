"""Resizes and crops an RGB image to the square of pixels that an encoder takes.

This is timm's evaluation transform (Resize, then CenterCrop), but it resamples only the part inside the crop: Pillow's
`box` takes the crop in source coordinates, so that no pixel is computed and discarded. It rounds a few pixels the other
way; docs/benchmarks.md has the measured drift.
"""

import numpy as np
from PIL import Image

from pipeline.embeddings.encoder_choice import PIXEL_PATHS, DecodingChoice
from pipeline.errors import EncoderError
from pipeline.store.tables.identity import Preprocessing

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}

# DINOv2 was evaluated at resize 256, crop 224 (dinov2's make_classification_eval_transform, and the paper), while
# timm's configuration of these models says 518 pixels.
DINOV2_CROP = 224
DINOV2_CROP_PCT = 0.875


# A scaled decode leaves each side at least so many times its resized length: the antialiased resize still works on at
# least twice the pixels that it makes.
DRAFT_MARGIN = 2


def preprocessing_for(
    data_config: dict, encoder: str, image_size: int | None, decoding: DecodingChoice | None = None
) -> Preprocessing:
    """Pin the preprocessing of a timm model.

    `data_config` is the result of timm's `resolve_model_data_config`. `image_size` overrides the crop; the model's
    ratio of crop to resize stays. `decoding` "scaled" allows large JPEG files to be decoded smaller. Raises
    EncoderError for a model whose input is not square RGB.
    """
    channels, height, width = data_config["input_size"]
    if channels != 3 or height != width:
        raise EncoderError(
            f"{encoder} takes {channels} x {height} x {width} inputs: choose a model for square RGB images"
        )
    crop, crop_pct = height, data_config["crop_pct"]
    if "dinov2" in encoder:
        crop, crop_pct = DINOV2_CROP, DINOV2_CROP_PCT
    crop = image_size or crop
    crop_mode, interpolation = data_config["crop_mode"], data_config["interpolation"]
    if crop_mode not in ("center", "squash") or interpolation not in _RESAMPLING:
        raise EncoderError(f"{encoder} asks for crop mode {crop_mode} with {interpolation}, which is not supported")
    return Preprocessing(
        resize=int(crop / crop_pct),
        crop=crop,
        crop_mode=crop_mode,
        interpolation=interpolation,
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
        pixel_path=PIXEL_PATHS[decoding or "exact"],
    )


def shortest_of(preprocessing: Preprocessing) -> int | None:
    """The least pixels of a side when a JPEG is decoded smaller; None if it is decoded at full size."""
    return DRAFT_MARGIN * preprocessing.resize if preprocessing.pixel_path == "pillow-draft" else None


def pixels_of(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and crop an RGB image: uint8 [crop, crop, 3]."""
    crop = preprocessing.crop
    resampling = _RESAMPLING[preprocessing.interpolation]
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(preprocessing.resize * long / short)  # torchvision's rounding
    resized = (preprocessing.resize, resized_long) if width <= height else (resized_long, preprocessing.resize)
    if preprocessing.crop_mode == "squash":
        resized = (preprocessing.resize, preprocessing.resize)
    if min(resized) < crop:  # a crop larger than the resized image is padded with black, as torchvision does
        return _padded_crop(image.resize(resized, resampling), crop)
    left, top = round((resized[0] - crop) / 2.0), round((resized[1] - crop) / 2.0)
    across, down = width / resized[0], height / resized[1]
    box = (left * across, top * down, min((left + crop) * across, width), min((top + crop) * down, height))
    return np.asarray(image.resize((crop, crop), resampling, box=box))


def _padded_crop(image: Image.Image, crop: int) -> np.ndarray:
    canvas = Image.new("RGB", (crop, crop))
    canvas.paste(image, (round((crop - image.width) / 2.0), round((crop - image.height) / 2.0)))
    return np.asarray(canvas)
