"""BMPs with masks that give the bits of each colour in 16 or 32 bits, for masks that Pillow does not know.

Pillow refuses most masks, such as four bits each, and ignores the alpha of 16-bit pixels.
"""

import struct

import numpy as np
from PIL import Image

_BITFIELDS = (3, 6)  # the second has a mask of alpha even after a header of 40 bytes
_KNOWN_TO_PILLOW = ((0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0))  # of 16 bits
_PIXELS_AT_ONCE = 1 << 20


def has_unknown_masks(data: bytes) -> bool:
    """Whether the bytes are a BMP of 16-bit pixels that Pillow would refuse or show without its alpha."""
    return data.startswith(b"BM") and len(data) >= 70 and _bits(data) == 16 and _masks(data) not in _KNOWN_TO_PILLOW


def rgb_of_bitfields(data: bytes) -> Image.Image:
    """An RGB image, alpha laid on white. Raises ValueError if it is no BMP with masks, or truncated."""
    masks, bits = _masks(data), _bits(data)
    width, height = struct.unpack_from("<ii", data, 18)
    if bits not in (16, 32) or not any(masks) or width <= 0 or height == 0:
        raise ValueError(f"a BMP of {bits} bits and the masks {', '.join(map(hex, masks))} is not known")
    (offset,) = struct.unpack_from("<I", data, 10)
    stride = (width * bits + 31) // 32 * 4
    stored = np.frombuffer(data, np.uint8)[offset : offset + stride * abs(height)]
    if stored.size < stride * abs(height):
        raise ValueError("the BMP is truncated")
    rows = stored.reshape(abs(height), stride)[:, : width * bits // 8]
    if height > 0:  # the bottom row comes first
        rows = rows[::-1]
    rgb_HW3 = np.empty((abs(height), width, 3), np.uint8)
    step = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, abs(height), step):
        values_HW = np.ascontiguousarray(rows[top : top + step]).view(f"<u{bits // 8}").astype(np.uint32)
        red, green, blue, alpha = (_fraction(values_HW, mask) for mask in masks)
        colours = np.stack([red, green, blue], axis=2)
        if masks[3]:
            colours = colours * alpha[:, :, None] + 1.0 - alpha[:, :, None]
        rgb_HW3[top : top + step] = colours * 255.0 + 0.5
    return Image.fromarray(rgb_HW3)


def size_of_bitfields(data: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)


def _bits(data: bytes) -> int:
    """Bits of a pixel; 0 if the BMP has no masks."""
    header, bits, compression = *struct.unpack_from("<I", data, 14), *struct.unpack_from("<HI", data, 28)
    return bits if header >= 40 and compression in _BITFIELDS else 0


def _masks(data: bytes) -> tuple[int, ...]:
    """The masks of red, green, blue and alpha (0: none). A header of 40 bytes has alpha only in the second way."""
    header, compression = struct.unpack_from("<I", data, 14)[0], struct.unpack_from("<I", data, 30)[0]
    masks = struct.unpack_from("<4I", data, 54)
    return masks if header >= 56 or compression == _BITFIELDS[1] else (*masks[:3], 0)


def _fraction(values_HW: np.ndarray, mask: int) -> np.ndarray:
    """float64 [H, W] from 0 to 1: a channel of uint32 pixels as a fraction of its largest value."""
    if not mask:
        return np.zeros(values_HW.shape)
    shift = (mask & -mask).bit_length() - 1
    return ((values_HW & np.uint32(mask)) >> np.uint32(shift)) / float(mask >> shift)
