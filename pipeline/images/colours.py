"""An image of Pillow's, of any mode, to 8-bit RGB on white."""

import io
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from pipeline.images.cielab import srgb_of_cielab
from pipeline.images.scales import finite, full_scale, to_8_bits

_GREY_STEPS = {"L;2": 85, "L;4": 17}  # from the greys of a PNG of 2 and 4 bits to those of 8
_OPAQUE = frozenset({"RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX", "HSV"})
_PIXELS_AT_ONCE = 1 << 20
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258


def rgb_of(image: Image.Image) -> Image.Image:
    """8-bit RGB, not turned; loads the image if it is not. What is transparent shows white."""
    transparency = image.info.get("transparency")
    rawmode = _rawmode(image) if transparency is not None else ""
    low_bytes = _low_bytes(image) if rawmode == "RGB;16B" and isinstance(transparency, tuple) else None
    image.load()
    if image.mode in _OPAQUE and transparency is None and (image.format == "PNG" or "transparency" not in image.info):
        return image.convert("RGB")  # of a PNG, what comes behind the pixels does not count
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_grey_to_8_bits(image, transparency)).convert("RGB")
    if image.mode == "LAB":
        return _of_cielab(image)
    if isinstance(image, PngImagePlugin.PngImageFile) and image.mode in ("L", "RGB"):
        return _without_one_colour(image, transparency, rawmode, low_bytes)
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _rawmode(image: Image.Image) -> str:
    """How the pixels of a file are stored, as Pillow names it; empty once they are loaded."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def _without_one_colour(
    image: Image.Image, transparency: Any, rawmode: str, low_bytes: np.ndarray | None
) -> Image.Image:
    """White in place of the one grey or colour that a PNG names, at the depth of the file."""
    pixels = np.asarray(image)
    if image.mode == "L":
        step = _GREY_STEPS.get(rawmode, 1)
        hidden_HW = pixels == (transparency & 255 // step) * step
    elif low_bytes is not None:
        named = np.array(transparency)
        hidden_HW = (pixels == named >> 8).all(axis=2) & (low_bytes == named & 255).all(axis=2)
    else:
        hidden_HW = (pixels == np.array(transparency) & 255).all(axis=2)
    rgb = image.convert("RGB")
    rgb.paste("white", mask=Image.fromarray(hidden_HW.astype(np.uint8) * 255))
    return rgb


def _low_bytes(image: Image.Image) -> np.ndarray | None:
    """uint8 [H, W, 3]: the lower halves of the samples of a 16-bit RGB PNG, of which Pillow keeps the upper only."""
    stream = getattr(image, "fp", None)
    if stream is None:
        return None
    place = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(place)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
        again.tile = [again.tile[0]._replace(args="RGB;16L")]  # the other half comes first in this order of bytes
        return np.asarray(again)


def _of_cielab(image: Image.Image) -> Image.Image:
    lab_HW3 = np.asarray(image)
    rgb_HW3 = np.empty(lab_HW3.shape, np.uint8)
    for rows in _runs(image):
        lab = lab_HW3[rows].astype(np.float64)
        lab[..., 0] *= 100.0 / 255.0
        lab[..., 1:] = lab_HW3[rows][..., 1:].view(np.int8)
        rgb_HW3[rows] = srgb_of_cielab(lab)
    return Image.fromarray(rgb_HW3)


def _grey_to_8_bits(image: Image.Image, transparency: Any) -> np.ndarray:
    """uint8 [H, W] from 16-bit, 32-bit or float greys; a grey marked transparent becomes white."""
    grey_HW = np.asarray(image)
    is_float, bits, white_is_zero = image.mode == "F", 16 if image.mode.startswith("I;16") else 31, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white_is_zero = image.tag_v2.get(_PHOTOMETRIC) == 0
        if image.tag_v2.get(_BITS_PER_SAMPLE) == (12,):
            bits = 12
    largest = 0.0
    if bits > 16:
        largest = max((float(finite(grey_HW[rows]).max(initial=0.0)) for rows in _runs(image)), default=0.0)
    white = full_scale(largest, bits, is_float=is_float)
    scaled_HW = np.empty(grey_HW.shape, np.uint8)
    for rows in _runs(image):
        scaled_HW[rows] = to_8_bits(grey_HW[rows], white, white_is_zero=white_is_zero)
    if isinstance(transparency, int):
        scaled_HW[grey_HW == transparency] = 255
    return scaled_HW


def _runs(image: Image.Image) -> list[slice]:
    """Rows of about a million pixels, so that wide numbers are never made of all at once."""
    step = max(1, _PIXELS_AT_ONCE // max(1, image.width))
    return [slice(top, top + step) for top in range(0, image.height, step)]
