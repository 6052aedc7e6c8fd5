"""From the bytes of an image file to 8-bit RGB, or to the reason why not.

What is fixed here is part of the encoder's identity as pixel path "pillow": EXIF orientation applied, transparency on
white, the first frame of an animation, 16-bit and float greys scaled to 8 bits, CMYK and CIELAB converted to sRGB;
embedded colour profiles are not applied (neither timm nor the paper's code applies them). Pixel path "pillow-draft"
differs in that large JPEG files are decoded at a half, a quarter or an eighth of their size.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # "JPEG" opens MPO too
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: twice 1 GiB / 4 / 3 pixels
MAX_FILE_BYTES = 512 << 20  # an image file beyond that is rejected unread
ORIENTATION_TAG = 0x0112

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = {5, 6, 7, 8}  # by a right angle


class Rejected(Exception):
    """An image that cannot become an entry: the stage it failed in and the reason, as one clause."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple:
        return Rejected, (self.stage, self.reason)


@dataclass(frozen=True)
class Decoded:
    """An RGB image, with the sha256 of the bytes it came from; width and height of the whole in pixels as displayed."""

    image: Image.Image
    sha256: str
    width: int
    height: int


def decode(data: bytes, shortest: int | None = None) -> Decoded:
    """Decode the bytes of an image file. Raises Rejected at stage "decode".

    With `shortest`, a JPEG may come out smaller by a power of two, no side with fewer pixels than that.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Rejected("decode", f"{opened.width} x {opened.height} pixels is more than {MAX_PIXELS:,}")
            whole = opened.size
            if shortest is not None:
                opened.draft(None, (shortest, shortest))
            scaled = opened.size != whole
            opened.load()
            image = as_displayed(opened)
            width, height = image.size
            if scaled:
                width, height = reversed(whole) if _orientation(opened) in _TURNED else whole
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("decode", f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise Rejected("decode", f"not an image in {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders meet hostile bytes with errors of every type; each is a reject, none a crash
        raise Rejected("decode", " ".join(str(error).split()) or type(error).__name__) from error
    return Decoded(image, hashlib.sha256(data).hexdigest(), width, height)


def dimensions(data: bytes) -> tuple[int, int]:
    """Width and height in pixels that an image file says it has, nothing of it decoded. Raises Rejected."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            return opened.size
    except Image.DecompressionBombError as error:
        raise Rejected("decode", f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise Rejected("decode", f"not an image in {', '.join(FORMATS)}") from error
    except Exception as error:  # as in decode
        raise Rejected("decode", " ".join(str(error).split()) or type(error).__name__) from error


def as_displayed(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, turned as its EXIF orientation says."""
    rgb = _rgb(image)
    transposition = _TRANSPOSITIONS.get(_orientation(image))
    return rgb.transpose(transposition) if transposition is not None else rgb


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels: they are shown as stored
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_grey_to_8_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:  # only for inPlace=True, says the signature
            raise Rejected("decode", "the CIELAB image cannot be converted")
        return converted
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] from 16-bit, 32-bit or float greys; a grey marked transparent becomes white.

    Floats up to 2 are taken to have the full scale 1; larger values that of 8 bits, 16 bits, or their own maximum.
    """
    grey_HW = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if image.mode.startswith("I;16"):
        full_scale = 65_535.0
    else:
        largest = grey_HW.max(initial=0.0)
        if image.mode == "F" and largest <= 2.0:
            full_scale = 1.0
        else:
            full_scale = 255.0 if largest <= 255.0 else max(65_535.0, largest)
    scaled_HW = (np.clip(grey_HW / full_scale, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled_HW[grey_HW == transparent] = 255
    return scaled_HW
