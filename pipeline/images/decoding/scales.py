"""Conversion of samples of more than 8 bits to 8 bits, and the value of white if the file does not give it."""

from functools import lru_cache

import numpy as np

_VALUES_AT_ONCE = 1 << 15  # as float64 they stay in a core's cache, which makes this three times as fast
_LARGEST_OWN_SCALE = 1 << 24  # larger whole numbers are taken to use all the bits of their type


def full_scale(largest: float, bits: int, *, is_float: bool) -> float:
    """The value of white. Whole numbers of up to 16 bits use all of their bits.

    Floats up to 2 are taken to have the full scale 1. Larger floats, and whole numbers of more bits, have the full
    scale of 8 bits, or of 16 bits, if `largest` fits. Beyond that the full scale is `largest`. Whole numbers are an
    exception if they use more than 24 bits or have at most 24 bits: their full scale is that of their type.
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
    """The values as float64 of the same shape; NaN and infinite values become 0."""
    wide = values.astype(np.float64)
    if values.dtype.kind == "f":
        wide[~np.isfinite(wide)] = 0.0
    return wide


def finite_max(values: np.ndarray) -> float:
    """The largest of the finite values, at least 0."""
    if values.dtype.kind != "f":
        return max(float(values.max(initial=0)), 0.0)
    with np.errstate(invalid="ignore"):
        largest = float(np.fmax.reduce(values, axis=None, initial=0.0))
    return largest if np.isfinite(largest) else float(finite(values).max(initial=0.0))


def to_8_bits(values: np.ndarray, white: float, *, white_is_zero: bool = False) -> np.ndarray:
    """uint8 of the same shape, rounded: 0 and less is black, `white` and more is white; reversed if `white_is_zero`."""
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:  # ten times as fast, and the same to the bit
        return np.take(_table(white, white_is_zero), values)
    flat = values.reshape(-1)
    scaled = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), _VALUES_AT_ONCE):
        run = slice(start, start + _VALUES_AT_ONCE)
        scaled[run] = _to_8_bits(flat[run], white, white_is_zero)
    return scaled.reshape(values.shape)


@lru_cache(maxsize=8)
def _table(white: float, white_is_zero: bool) -> np.ndarray:
    return _to_8_bits(np.arange(1 << 16), white, white_is_zero)


def _to_8_bits(values: np.ndarray, white: float, white_is_zero: bool) -> np.ndarray:
    shares = finite(values)
    shares /= white
    if white_is_zero:
        np.subtract(1.0, shares, out=shares)
    np.clip(shares, 0.0, 1.0, out=shares)
    shares *= 255.0
    shares += 0.5
    return shares.astype(np.uint8)
