"""What kind of file a name says it is."""

from typing import Literal

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET = (".parquet", ".pq")
NPY = ".npy"

Kind = Literal["image", "tar", "parquet", "npy"]


def kind_of(name: str) -> Kind | None:
    """The kind of a file by the end of its name, in whatever case; None for one that is no source."""
    lower = name.lower()
    if lower.endswith(IMAGES):
        return "image"
    if lower.endswith(TARS):
        return "tar"
    if lower.endswith(NPY):
        return "npy"
    return "parquet" if lower.endswith(PARQUET) else None


def endings() -> str:
    """The ends of names that are looked for, for a message."""
    return ", ".join(sorted((*IMAGES, *TARS, *PARQUET, NPY)))
