"""Conversion of a Pillow image of any mode to 8-bit RGB on white."""

import io
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from pipeline.images.decoding.cielab import srgb_of_cielab
from pipeline.images.decoding.scales import finite_max, full_scale, to_8_bits

_GREY_STEPS = {"L;2": 85, "L;4": 17}  # factors from 2-bit and 4-bit greys of a PNG to 8-bit greys
_OPAQUE = frozenset({"RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX", "HSV"})
_PIXELS_AT_ONCE = 1 << 20
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258


def rgb_of(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, not turned. Loads it if needed. Transparent pixels become white."""
    transparency = image.info.get("transparency")
    rawmode = _rawmode(image) if transparency is not None else ""
    low_bytes = None
    if rawmode == "RGB;16B" and isinstance(transparency, tuple):
        low_bytes = _low_bytes_fit(image, transparency)
    image.load()
    if image.mode in _OPAQUE and transparency is None and (image.format == "PNG" or "transparency" not in image.info):
        # Transparency that a PNG gives only after its pixels does not count.
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_8_bits(image, transparency)
    if image.mode == "LAB":
        return _of_cielab(image)
    if isinstance(image, PngImagePlugin.PngImageFile) and image.mode in ("L", "RGB"):
        return _without_one_colour(image, transparency, rawmode, low_bytes)
    if image.width * image.height <= _PIXELS_AT_ONCE:
        return _on_white(image)
    rgb = Image.new("RGB", image.size)
    for box in _boxes(image):
        rgb.paste(_on_white(image.crop(box)), box)
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _rawmode(image: Image.Image) -> str:
    """Pillow's name for the way the pixels of a file are stored; empty once they are loaded."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def _without_one_colour(
    image: Image.Image, transparency: Any, rawmode: str, low_bytes: np.ndarray | None
) -> Image.Image:
    """RGB with white in place of the one grey or colour that a PNG marks transparent, compared at the file's depth."""
    rgb = image.convert("RGB")
    for box in _boxes(image):
        pixels = np.asarray(image.crop(box))
        if image.mode == "L":
            step = _GREY_STEPS.get(rawmode, 1)
            hidden_HW = pixels == (transparency & 255 // step) * step
        elif low_bytes is not None:
            hidden_HW = (pixels == np.array(transparency) >> 8).all(axis=2) & low_bytes[box[1] : box[3]]
        else:
            hidden_HW = (pixels == np.array(transparency) & 255).all(axis=2)
        rgb.paste("white", box, Image.fromarray(hidden_HW.astype(np.uint8) * 255))
    return rgb


def _low_bytes_fit(image: Image.Image, transparency: tuple[int, ...]) -> np.ndarray | None:
    """Whether the lower halves of the samples of a 16-bit RGB PNG are those of the transparent colour: bool [H, W].

    Pillow gives the upper halves only.
    """
    stream = getattr(image, "fp", None)
    if stream is None:
        return None
    place = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(place)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
        again.tile = [again.tile[0]._replace(args="RGB;16L")]  # in this byte order the other half comes first
        named = np.array(transparency) & 255
        fit_HW: np.ndarray = np.concatenate(
            [(np.asarray(again.crop(box)) == named).all(axis=2) for box in _boxes(again)]
        )
        return fit_HW


def _of_cielab(image: Image.Image) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for box in _boxes(image):
        stored_HW3 = np.asarray(image.crop(box))
        lab = stored_HW3.astype(np.float64)
        lab[..., 0] *= 100.0 / 255.0
        lab[..., 1:] = stored_HW3[..., 1:].view(np.int8)
        rgb.paste(Image.fromarray(srgb_of_cielab(lab)), box)
    return rgb


def _grey_to_8_bits(image: Image.Image, transparency: Any) -> Image.Image:
    """RGB from 16-bit, 32-bit or float greys; a grey marked transparent becomes white."""
    is_float, bits, white_is_zero = image.mode == "F", 16 if image.mode.startswith("I;16") else 31, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white_is_zero = image.tag_v2.get(_PHOTOMETRIC) == 0
        if image.tag_v2.get(_BITS_PER_SAMPLE) == (12,):
            bits = 12
    largest = 0.0
    if bits > 16:
        largest = max((finite_max(np.asarray(image.crop(box))) for box in _boxes(image)), default=0.0)
    white = full_scale(largest, bits, is_float=is_float)
    rgb = Image.new("RGB", image.size)
    for box in _boxes(image):
        grey_HW = np.asarray(image.crop(box))
        scaled_HW = to_8_bits(grey_HW, white, white_is_zero=white_is_zero)
        if isinstance(transparency, int):
            scaled_HW[grey_HW == transparency] = 255
        rgb.paste(Image.fromarray(scaled_HW).convert("RGB"), box)
    return rgb


def _boxes(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Runs of rows of about a million pixels, so that no copy and no array of wide numbers has the whole image."""
    step = max(1, _PIXELS_AT_ONCE // max(1, image.width))
    tops = range(0, image.height, step)
    return [(0, top, image.width, min(top + step, image.height)) for top in tops]
