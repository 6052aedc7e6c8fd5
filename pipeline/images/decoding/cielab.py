"""CIE L*a*b* to sRGB, relative to the white that the file names."""

import numpy as np

D50 = (0.3457, 0.3585)  # the white of the ICC's CIELAB, and of a file that names none
D65 = (0.3127, 0.3290)  # the white of sRGB
# Bradford's cone responses, and linear sRGB from XYZ under D65: IEC 61966-2-1.
_CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_LINEAR_OF_XYZ = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])


def srgb_of_cielab(lab_HW3: np.ndarray, white_point: tuple[float, float] | None = None) -> np.ndarray:
    """CIELAB (float64 [H, W, 3]: lightness 0 to 100, a, b) to sRGB (uint8 [H, W, 3]).

    `white_point` is the chromaticity x, y of white, by default D50.
    """
    white = _xyz(white_point if white_point is not None and min(white_point) > 0.01 else D50)
    y = (lab_HW3[..., 0] + 16.0) / 116.0
    roots = np.stack([y + lab_HW3[..., 1] / 500.0, y, y - lab_HW3[..., 2] / 200.0], axis=-1)
    xyz = white * np.where(roots > 6 / 29, roots**3, (roots - 4 / 29) * (3 * (6 / 29) ** 2))
    adapted = np.linalg.inv(_CONES) @ np.diag(_CONES @ _xyz(D65) / (_CONES @ white)) @ _CONES
    linear = np.clip(xyz @ (_LINEAR_OF_XYZ @ adapted).T, 0.0, 1.0)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (srgb * 255.0 + 0.5).astype(np.uint8)


def _xyz(chromaticity: tuple[float, float]) -> np.ndarray:
    x, y = chromaticity
    return np.array([x / y, 1.0, (1.0 - x - y) / y])
