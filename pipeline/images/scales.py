"""Samples of more than 8 bits to 8 bits: what the whitest value of a picture is, where the file does not say."""

from functools import lru_cache

import numpy as np

_LARGEST_OWN_SCALE = 1 << 24  # beyond, whole numbers are taken to use all the bits of their type


def full_scale(largest: float, bits: int, *, is_float: bool) -> float:
    """The value of white. Whole numbers of up to 16 bits use all of them.

    Floats up to 2 are taken to have the full scale 1. Larger ones, and whole numbers of more bits, have that of 8 bits
    or of 16 bits, if that is enough. Beyond, it is their own maximum, but for whole numbers that use more than 24 bits,
    or have no more, that of their type.
    """
    if not is_float and bits <= 16:
        return float((1 << bits) - 1)
    if is_float and largest <= 2.0:
        return 1.0
    if largest <= 255.0:
        return 255.0
    if largest > 65_535.0 and not is_float and (largest > _LARGEST_OWN_SCALE or bits <= 24):
        return float((1 << bits) - 1)
    return max(65_535.0, float(largest))


def finite(values: np.ndarray) -> np.ndarray:
    """float64 of the same shape; what is no number, or infinite, is 0."""
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def to_8_bits(values: np.ndarray, white: float, *, white_is_zero: bool = False) -> np.ndarray:
    """uint8 of the same shape: 0 and less is black, `white` and more is white, rounded; or the other way round."""
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:  # ten times as fast, and the same to the bit
        return np.take(_table(white, white_is_zero), values)
    return _to_8_bits(values, white, white_is_zero)


@lru_cache(maxsize=8)
def _table(white: float, white_is_zero: bool) -> np.ndarray:
    return _to_8_bits(np.arange(1 << 16), white, white_is_zero)


def _to_8_bits(values: np.ndarray, white: float, white_is_zero: bool) -> np.ndarray:
    shares = finite(values) / white
    scaled: np.ndarray = np.clip(1.0 - shares if white_is_zero else shares, 0.0, 1.0) * 255.0 + 0.5
    return scaled.astype(np.uint8)
