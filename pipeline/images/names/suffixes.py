"""The kind of a file, by its name."""

from typing import Literal

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET = (".parquet", ".pq")
NPY = ".npy"

Kind = Literal["image", "tar", "parquet", "npy"]


def kind_of(name: str) -> Kind | None:
    """The kind of a file by the ending of its name, in any case; None for a file without images or vectors."""
    lower = name.lower()
    if lower.endswith(IMAGES):
        return "image"
    if lower.endswith(TARS):
        return "tar"
    if lower.endswith(NPY):
        return "npy"
    return "parquet" if lower.endswith(PARQUET) else None


def endings() -> str:
    """The endings of files with images or vectors, for a message."""
    return ", ".join(sorted((*IMAGES, *TARS, *PARQUET, NPY)))
