"""Conversion of the samples of a TIFF to 8-bit RGB on white, as its header describes them."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from pipeline.images.decoding.cielab import srgb_of_cielab
from pipeline.images.decoding.scales import finite, finite_max, full_scale, to_8_bits
from pipeline.images.decoding.tiff_header import (
    BLACK_IS_ZERO,
    CIELAB,
    CMYK,
    FLOAT,
    PALETTE,
    RGB,
    SIGNED,
    WHITE_IS_ZERO,
    TiffHeader,
)
from pipeline.images.decoding.tiff_samples import TiffSamples

_NUM_COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, CIELAB: 3}
_UNSPECIFIED, _ASSOCIATED = (0,), (1,)  # the first extra sample; one without a name is alpha, too


def rgb_of_samples(data: bytes, header: TiffHeader) -> Image.Image:
    """An RGB image as stored, not turned. Raises ValueError with the reason if the TIFF cannot be read."""
    num_colours = _NUM_COLOURS.get(header.photometric)
    if num_colours is None:
        raise ValueError(f"the {header.kind} cannot be read: such colours are not known with such samples")
    if header.num_samples < num_colours:
        raise ValueError(f"the {header.kind} has {header.num_samples} samples a pixel, its colours need {num_colours}")
    samples = TiffSamples(data, header)
    colours_of = _conversion(header, samples, num_colours)
    rgb = Image.new("RGB", (header.width, header.height))
    top = 0
    for values in samples.rows():
        rgb_HW3 = colours_of(values[:, :, :num_colours])
        if header.num_samples > num_colours and header.extra_samples[:1] != _UNSPECIFIED:
            rgb_HW3 = _on_white(rgb_HW3, _alpha(values[:, :, num_colours], header), header)
        rgb.paste(Image.fromarray(np.ascontiguousarray(rgb_HW3)), (0, top))
        top += len(values)
    return rgb


def _conversion(header: TiffHeader, samples: TiffSamples, num_colours: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from [rows, width, colours] to uint8 [rows, width, 3]."""
    if header.photometric == PALETTE:
        return _palette_conversion(header)
    if header.photometric == CIELAB:
        return lambda values: _of_cielab(values, header)
    largest = 0.0
    if header.bits > 16 or header.sample_format == FLOAT:
        largest = max(finite_max(values[:, :, :num_colours]) for values in samples.rows())
    bits = header.bits - 1 if header.sample_format == SIGNED else header.bits
    white = full_scale(largest, bits, is_float=header.sample_format == FLOAT)

    def of_values(values: np.ndarray) -> np.ndarray:
        if header.photometric == CMYK:
            return _of_cmyk(to_8_bits(values, white))
        scaled = to_8_bits(values, white, white_is_zero=header.photometric == WHITE_IS_ZERO)
        return np.broadcast_to(scaled, (*scaled.shape[:2], 3))

    return of_values


def _palette_conversion(header: TiffHeader) -> Callable[[np.ndarray], np.ndarray]:
    num = 1 << header.bits
    if header.bits > 16 or header.sample_format == FLOAT or len(header.palette) < 3 * num:
        raise ValueError(f"the {header.kind} has {len(header.palette)} numbers in its palette")
    palette_K3 = np.array(header.palette[: 3 * num], dtype=np.uint32).reshape(3, num).T
    palette_K3 = (palette_K3 if header.has_8_bit_palette else palette_K3 >> 8).astype(np.uint8)
    return lambda values: palette_K3[values[:, :, 0].astype(np.intp) % num]


def _of_cmyk(values: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(values, "CMYK").convert("RGB"))


def _of_cielab(values: np.ndarray, header: TiffHeader) -> np.ndarray:
    """CIELAB to sRGB. Lightness is unsigned, a and b are signed, of 8 or 16 bits. TIFF has no other CIELAB."""
    if header.bits not in (8, 16) or header.sample_format == FLOAT:
        raise ValueError(f"the {header.kind} cannot be read: CIELAB has 8 or 16 bits")
    top = (1 << header.bits) - 1
    lightness = values[:, :, 0].astype(np.float64) % (top + 1) * (100.0 / top)
    signed = values[:, :, 1:].astype(f"i{header.bits // 8}") / float(1 << header.bits - 8)
    return srgb_of_cielab(np.concatenate([lightness[:, :, None], signed], axis=2), header.white_point)


def _alpha(values: np.ndarray, header: TiffHeader) -> np.ndarray:
    """Alpha as float64 [rows, width]; 1 is opaque."""
    if header.sample_format == FLOAT:
        return np.clip(finite(values), 0.0, 1.0)
    bits = header.bits - 1 if header.sample_format == SIGNED else header.bits
    return np.clip(finite(values) / float((1 << bits) - 1), 0.0, 1.0)


def _on_white(rgb: np.ndarray, alpha: np.ndarray, header: TiffHeader) -> np.ndarray:
    """Colours on white. Associated colours are stored multiplied by alpha; others are multiplied here."""
    opaque = alpha[:, :, None]
    colours = rgb if header.extra_samples[:1] == _ASSOCIATED else rgb * opaque
    rounded: np.ndarray = np.clip(colours + 255.0 * (1.0 - opaque), 0.0, 255.0) + 0.5
    return rounded.astype(np.uint8)
