"""The first directory of a TIFF, which describes its pixels: read and checked for the other TIFF modules."""

import io
from dataclasses import dataclass
from typing import Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, CIELAB = 0, 1, 2, 3, 5, 8
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
UNCOMPRESSED = 1
COMPRESSIONS = {  # their usual names
    1: "uncompressed", 2: "CCITT run lengths", 3: "CCITT group 3", 4: "CCITT group 4", 5: "LZW", 6: "JPEG of TIFF 6",
    7: "JPEG", 8: "Deflate", 9: "JBIG", 10: "JBIG", 32766: "NeXT", 32771: "CCITT run lengths", 32773: "PackBits",
    32809: "ThunderScan", 32946: "Deflate", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34661: "JBIG",
    34676: "SGILog", 34677: "SGILog", 34712: "JPEG 2000", 34887: "LERC", 34892: "lossy JPEG", 34925: "LZMA",
    50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_BYTEWISE = (1, 5, 8, 32773, 32946, 34925, 50000)
_JPEGS = (6, 7, 34892)
_MOST_SCANS = 100  # in a strip or tile; libtiff gives up beyond that
_PHOTOMETRICS = {
    0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB", 9: "ICCLAB",
    10: "ITULAB", 32803: "camera raw (CFA)", 32844: "LogL", 32845: "LogLuv", 34892: "camera raw (linear)",
}  # fmt: skip


@dataclass(frozen=True)
class TiffHeader:
    """The layout of the first picture. Rectangles are the strips or tiles in which its samples are stored."""

    byte_order: str  # as NumPy writes it: "<" or ">"
    width: int
    height: int
    bits: int
    num_samples: int
    sample_format: int
    photometric: int
    is_guessed: bool  # the file does not say its photometric
    compression: int
    predictor: int
    is_planar: bool  # each sample in rectangles of its own
    is_tiled: bool
    bits_from_right: bool
    rectangle: tuple[int, int]  # width and height in pixels
    offsets: tuple[int, ...]
    counts: tuple[int, ...]  # empty if the file does not say
    extra_samples: tuple[int, ...]
    palette: tuple[int, ...]
    white_point: tuple[float, float] | None
    orientation: int

    @property
    def bytewise(self) -> bool:
        """Whether the compression works on bytes, whatever they mean."""
        return self.compression in _BYTEWISE

    @property
    def has_8_bit_palette(self) -> bool:
        """Whether the palette has 8-bit colours in place of TIFF's 16-bit ones. Some programs write such palettes.

        libtiff uses the same rule.
        """
        return self.photometric == PALETTE and bool(self.palette) and max(self.palette) < 256

    @property
    def covered(self) -> tuple[int, int]:
        """Width and height in pixels of all strips or tiles together, which may reach beyond the picture."""
        width, height = self.rectangle
        if not self.is_tiled or width <= 0 or height <= 0:
            return self.width, self.height
        return -(-self.width // width) * width, -(-self.height // height) * height

    def passes_over(self, data: bytes) -> int:
        """Passes of decoding over the pixels: the most scans of a JPEG in one strip or tile. Raises ValueError."""
        if self.compression not in _JPEGS:
            return 1
        if sum(self.counts) > 4 * len(data):  # strips that share bytes are decoded over and over
            raise ValueError(f"the {self.kind} says that its strips or tiles are longer than the file")
        places = zip(self.offsets, self.counts, strict=False)
        scans = max((data.count(b"\xff\xda", at, at + length) for at, length in places), default=1)
        return min(max(scans, 1), _MOST_SCANS)

    @property
    def has_wide_planes(self) -> bool:
        return self.is_planar and self.bits > 8

    @property
    def kind(self) -> str:
        """The kind in words: "16-bit grey TIFF (LZW)"."""
        numbers = {UNSIGNED: "", SIGNED: " signed", FLOAT: " float"}.get(self.sample_format, " complex")
        colours = _PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}")
        compression = COMPRESSIONS.get(self.compression, f"compression {self.compression}")
        return f"{self.bits}-bit{numbers} {colours} TIFF ({compression})"


def is_tiff(data: bytes) -> bool:
    """Whether the first bytes are those of a TIFF."""
    return data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def read_header(data: bytes) -> TiffHeader:
    """The header of a TIFF. Raises ValueError if its directory cannot describe a picture."""
    tags = ImageFileDirectory_v2(data[:16] if data[2] == 43 or data[3] == 43 else data[:8])
    stream = io.BytesIO(data)
    if tags.next >= len(data):
        raise ValueError("the TIFF is truncated: its directory lies behind its end")
    stream.seek(tags.next)
    tags.load(stream)
    width, height, bits = _whole(tags, 256), _whole(tags, 257), _wholes(tags, 258) or (1,)
    if not width or not height:
        raise ValueError("the TIFF does not say how large it is")
    if len(set(bits)) > 1:
        raise ValueError(f"a TIFF with samples of {' and '.join(map(str, sorted(set(bits))))} bits in one pixel")
    num_samples = _whole(tags, 277) or len(bits)
    formats = set(_wholes(tags, 339)) or {UNSIGNED}
    is_tiled = 324 in tags
    rectangle = (
        (_whole(tags, 322), _whole(tags, 323)) if is_tiled else (width, min(_whole(tags, 278) or height, height))
    )
    white_point = tags.get(318)
    guess = RGB if num_samples >= 3 else BLACK_IS_ZERO  # libtiff guesses the same
    return TiffHeader(
        byte_order="<" if tags.prefix == b"II" else ">",
        width=width,
        height=height,
        bits=bits[0],
        num_samples=num_samples,
        sample_format=formats.pop() if len(formats) == 1 else 0,
        photometric=_whole(tags, 262) if 262 in tags else guess,
        is_guessed=262 not in tags,
        compression=_whole(tags, 259) or UNCOMPRESSED,
        predictor=_whole(tags, 317) or 1,
        is_planar=_whole(tags, 284) == 2 and num_samples > 1,
        is_tiled=is_tiled,
        bits_from_right=_whole(tags, 266) == 2,
        rectangle=rectangle,
        offsets=_wholes(tags, 324 if is_tiled else 273),
        counts=_wholes(tags, 325 if is_tiled else 279),
        extra_samples=_wholes(tags, 338),
        palette=_wholes(tags, 320),
        white_point=(float(white_point[0]), float(white_point[1]))
        if isinstance(white_point, tuple) and len(white_point) == 2
        else None,
        orientation=_whole(tags, 274) or 1,
    )


def _wholes(tags: ImageFileDirectory_v2, tag: int) -> tuple[int, ...]:
    found: Any = tags.get(tag, ())
    found = found if isinstance(found, tuple) else tuple(found) if isinstance(found, bytes) else (found,)
    return tuple(int(number) for number in found)


def _whole(tags: ImageFileDirectory_v2, tag: int) -> int:
    """The first number of a tag; 0 if the tag is not there."""
    return next(iter(_wholes(tags, tag)), 0)
