"""Decoding of the bytes of an image file to 8-bit RGB, or the reason why that fails.

The rules here are part of the encoder's identity as pixel path "pillow": EXIF orientation applied, transparency on
white, the first frame of an animation, 16-bit and float greys scaled to 8 bits, CMYK and CIELAB converted to sRGB.
Embedded colour profiles are not applied (neither timm nor the paper's code applies them). Pixel path "pillow-draft"
differs in one rule: large JPEG files are decoded at a half, a quarter or an eighth of their size.

Pillow decodes. The modules beside this one mend files that Pillow refuses and browsers show: PNGs whose other chunks
are damaged, JPEG files that lack only their end marker, TIFFs of more kinds of samples.
"""

import contextlib
import hashlib
import io
import struct
from dataclasses import dataclass

from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from pipeline.images.decoding import jpeg_ends
from pipeline.images.decoding.bmp_bitfields import has_unknown_masks, rgb_of_bitfields, size_of_bitfields
from pipeline.images.decoding.colours import rgb_of
from pipeline.images.decoding.passes import passes_over, refuse_work
from pipeline.images.decoding.png_chunks import is_png, texts_hide_pixels, without_ancillary
from pipeline.images.decoding.tag_directories import is_bomb
from pipeline.images.decoding.tiff_colours import rgb_of_samples
from pipeline.images.decoding.tiff_header import CIELAB, TiffHeader, is_tiff, read_header

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
_MASKS = "Unsupported BMP bitfields layout"  # Pillow's message
_TURNED = {5, 6, 7, 8}  # by a right angle


class Rejected(Exception):
    """An image that cannot become an entry: the stage it failed in and the reason, as one clause."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple:
        return Rejected, (self.stage, self.reason)


class Heavy(Exception):
    """Decoding an image would cost more than the caller allows; `work` has the cost."""

    def __init__(self, work: "Work") -> None:
        super().__init__(f"the cost of {work.cost:,} pixels")
        self.work = work


@dataclass(frozen=True)
class Decoded:
    """An RGB image, the sha256 of its file's bytes, and width and height in pixels of the whole image as displayed."""

    image: Image.Image
    sha256: str
    width: int
    height: int


def decode(data: bytes, shortest: int | None = None, most: int | None = None) -> Decoded:
    """Decode the bytes of an image file. Raises Rejected at stage "decode".

    With `shortest`, a JPEG may be decoded smaller by a power of two, but with no side below `shortest` pixels. With
    `most`, raises Heavy if decoding would cost more than `most` pixels.
    """
    try:
        image, width, height = _decode(data, shortest, most)
    except (Rejected, Heavy):
        raise
    except Exception as error:  # hostile bytes raise errors of every type; each is a reject, not a crash
        raise _rejected(data, error) from error
    return Decoded(image, hashlib.sha256(data).hexdigest(), width, height)


@dataclass(frozen=True)
class Work:
    """The work of decoding an image file: width and height in pixels from its header, and passes over the pixels."""

    width: int
    height: int
    passes: int = 1

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def cost(self) -> int:
        """Pixels, plus an eighth of them for each further pass: a scan takes some 1.2 ns a pixel, the first pass 10."""
        return self.pixels * (7 + self.passes) // 8


def work_of(data: bytes) -> Work:
    """The work of decoding an image file, from its headers, in microseconds. Raises Rejected as `decode` would."""
    try:
        passes = passes_over(data)
        if is_tiff(data):
            passes = read_header(data).passes_over(data)
        width, height = _dimensions(data)
        work = Work(width, height, passes)
        _refuse_bomb(work)
    except Exception as error:  # as in decode
        raise _rejected(data, error) from error
    return work


def dimensions(data: bytes) -> tuple[int, int]:
    """Width and height in pixels from the headers of an image file, without decoding it. Raises Rejected."""
    work = work_of(data)
    return work.width, work.height


def _dimensions(data: bytes) -> tuple[int, int]:
    try:
        with _open(data) as opened:
            return opened.size
    except Image.DecompressionBombError:
        raise
    except Exception as error:  # as in decode
        unmended = error
    if str(unmended) == _MASKS:
        return size_of_bitfields(data)
    if is_tiff(data):
        header = read_header(data)
        size = header.width, header.height
        return size[::-1] if header.orientation in _TURNED else size
    mended = _mended(data, 1, None, at_end=False)
    if mended == data:
        raise unmended
    with _open(mended) as opened:
        return opened.size


def as_displayed(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, turned as its EXIF orientation says. Raises what Pillow raises, or ValueError."""
    if (
        image.format == "TIFF"
        and isinstance(image, ImageFile.ImageFile)
        and image.tile
        and image.fp
        and not image.tell()
    ):
        image.fp.seek(0)
        try:
            return _decode_tiff(image.fp.read(), None)[0]
        except Rejected as rejected:
            raise ValueError(rejected.reason) from rejected
    return _turned(rgb_of(image), _orientation(image))


def _decode(data: bytes, shortest: int | None, most: int | None) -> tuple[Image.Image, int, int]:
    """The image as displayed, and the width and height of the whole image."""
    passes = passes_over(data)
    if is_tiff(data):
        return _decode_tiff(data, most)
    if has_unknown_masks(data):
        return _decode_bitfields(data, most)
    if jpeg_ends.lost_its_end(data):
        data = _with_end(data, passes, most)
    try:
        return _decode_with_pillow(data, shortest, passes, most)
    except (Rejected, Heavy, Image.DecompressionBombError):
        raise
    except Exception as error:  # as in decode
        if str(error) == _MASKS:
            return _decode_bitfields(data, most)
        mended = _mended(data, passes, most, at_end="truncated" in str(error))
        if mended == data:
            raise
    return _decode_with_pillow(mended, shortest, passes, most)


def _decode_with_pillow(
    data: bytes, shortest: int | None, passes: int, most: int | None
) -> tuple[Image.Image, int, int]:
    with _open(data) as opened:
        whole = opened.size
        _refuse_bomb(Work(*whole, passes), most)
        if shortest is not None:
            opened.draft(None, (shortest, shortest))
        is_smaller = opened.size != whole
        image = rgb_of(opened)
        if isinstance(opened, PngImagePlugin.PngImageFile) and opened.text and texts_hide_pixels(opened.text):
            raise ValueError("a text of the PNG is named like a property of its pixels")
        orientation = _orientation(opened) if opened.info else 1
        if orientation != 1:
            image = _turned(image, orientation)
        width, height = whole if is_smaller else image.size
        return (image, height, width) if is_smaller and orientation in _TURNED else (image, width, height)


def _decode_bitfields(data: bytes, most: int | None) -> tuple[Image.Image, int, int]:
    _refuse_bomb(Work(*size_of_bitfields(data)), most)
    image = rgb_of_bitfields(data)
    return image, *image.size


def _with_end(data: bytes, passes: int, most: int | None) -> bytes:
    """The JPEG with its end marker. It is decoded a few times for this."""
    with contextlib.suppress(UnidentifiedImageError), _open(data) as opened:  # otherwise `with_end` gives the reason
        width, height = opened.size
        _refuse_bomb(Work(width, height, passes * jpeg_ends.DECODED))
        _refuse_bomb(Work(width, height, passes), None if most is None else most // jpeg_ends.DECODED)
    return jpeg_ends.with_end(data)


def _mended(data: bytes, passes: int, most: int | None, *, at_end: bool) -> bytes:
    """The same picture in a form that Pillow reads, or the bytes as they are. Raises ValueError with the reason."""
    if is_png(data):
        return without_ancillary(data)
    if data.startswith(jpeg_ends.START):
        return _with_end(data, passes, most) if at_end else jpeg_ends.without_applications(data)
    return data


def _decode_tiff(data: bytes, most: int | None) -> tuple[Image.Image, int, int]:
    """Decode a TIFF with Pillow if Pillow is right about it, else from its samples."""
    header = read_header(data)
    _refuse_bomb(Work(header.width, header.height, header.passes_over(data)), most)
    _refuse_bomb(Work(*header.covered), most)
    if header.bytewise and (header.photometric == CIELAB or header.is_guessed or header.has_8_bit_palette):
        return _decode_samples(data, header)
    try:
        with _open(data) as opened:
            if opened.mode not in ("I", "F") and not opened.mode.startswith("I;16") and not header.has_wide_planes:
                image = rgb_of(opened)  # Pillow turns a TIFF when it loads it
                return image, *image.size
    except UnidentifiedImageError:
        pass  # not in Pillow's table
    except OSError as error:
        if str(error).startswith("decoder error"):
            raise ValueError(f"the {header.kind} is damaged or truncated, or its compression is not known") from error
        raise
    return _decode_samples(data, header)


def _decode_samples(data: bytes, header: TiffHeader) -> tuple[Image.Image, int, int]:
    image = _turned(rgb_of_samples(data, header), header.orientation)
    return image, *image.size


def _open(data: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _refuse_bomb(work: Work, most: int | None = None) -> None:
    if work.pixels > MAX_PIXELS:
        raise Rejected("decode", f"{work.width} x {work.height} pixels is more than {MAX_PIXELS:,}")
    refuse_work(work.width, work.height, work.passes)
    if most is not None and work.cost > most:
        raise Heavy(work)


def _rejected(data: bytes, error: Exception) -> Rejected:
    if isinstance(error, Rejected):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return Rejected("decode", f"more than {MAX_PIXELS:,} pixels")
    if isinstance(error, UnidentifiedImageError):
        return Rejected("decode", _why_unidentified(data))
    return Rejected("decode", _in_words(error))


def _why_unidentified(data: bytes) -> str:
    """The error of Pillow's reader for the format of the first bytes; Pillow itself does not pass it on."""
    for kind in FORMATS:
        read, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(data[:16]):
            try:
                read(io.BytesIO(data), "")
            except Exception as error:  # as in decode
                return f"a {kind} file that cannot be read: {_in_words(error)}"
    return f"not an image in {', '.join(FORMATS)}"


def _in_words(error: Exception) -> str:
    """An error as one clause. Readers that run over the end of a header raise errors of several types."""
    if isinstance(error, MemoryError):
        return "decoding it takes more memory than there is"
    cause = error.__cause__ if isinstance(error, SyntaxError) else error
    if isinstance(cause, IndexError | struct.error | TypeError | KeyError | EOFError):
        return "its header is damaged or truncated"
    if str(error) == "not identified by this driver":  # Pillow's message for a header without a size or without colours
        return "its header names no size, or no colours that are known here"
    return " ".join(str(error).split()) or type(error).__name__


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    transposition = _TRANSPOSITIONS.get(orientation)
    return image.transpose(transposition) if transposition is not None else image


def _orientation(image: Image.Image) -> int:
    try:
        return 1 if is_bomb(_exif(image)) else int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels: they are shown as stored
        return 1


def _exif(image: Image.Image) -> bytes:
    """The EXIF block that Pillow would read."""
    data = image.info.get("exif")
    if data is None:
        lines = image.info.get("Raw profile type exif", "").split("\n")[3:]  # ImageMagick's, in a text of a PNG
        data = bytes.fromhex("".join(lines))
    return bytes(data)
