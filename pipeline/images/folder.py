"""The folder source: image files in class sub-folders, or flat, listed once into an ordered table.

The order is that of the sorted uris, which fixes the ids. Nothing is opened here.
"""

import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipeline.errors import SourceError, UsageError
from pipeline.images.uris import printable, uri_of_path

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

Labels = Literal["folder", "none"]


@dataclass(frozen=True)
class Listing:
    """What a source holds: `images` has columns uri, label, num_bytes, modified; `skipped` counts other files.

    `is_file` tells a source that is one image from a folder of one.
    """

    uri: str
    name: str
    images: pa.Table
    skipped: int
    is_file: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(self.images.column("num_bytes").to_pylist())

    @property
    def labels(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted(set(self.images.column("label").drop_null().to_pylist()))


def parse_labels(option: str) -> Labels:
    """The value of `--labels`. Raises UsageError for one a folder cannot answer."""
    if option in ("folder", "none"):
        return option  # type: ignore[return-value]  # narrowed by the line above, which mypy does not follow
    raise UsageError(f"--labels {option} does not fit a folder of images: give folder (the class sub-folders) or none")


def list_folder(source: str, labels: Labels) -> Listing:
    """List the images under a folder, or the one image that `source` names.

    With `labels` "folder" an image's label is the first folder below the source, as in torchvision's ImageFolder; an
    image directly in the source has none, and a single file is labelled by the folder that holds it. Symbolic links
    are followed, each folder once. Raises SourceError when the source is missing, unreadable or without an image.
    """
    root = Path(os.path.abspath(os.path.expanduser(source.removeprefix("file://"))))
    if "://" in source and not source.startswith("file://"):
        raise SourceError(f"the source {source} is not a local path, and only folders on this machine can be read yet")
    if not root.exists():
        raise SourceError(f"there is no source at {root}: check the path")
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise SourceError(f"{root} is not an image file: give a folder of images, or a file ending in {_endings()}")
        found, skipped, top = [str(root)], 0, root.parent.parent
        name = root.parent.name
    else:
        found, skipped = [], 0
        for path in _walk(root):
            if os.path.splitext(path)[1].lower() in SUFFIXES:
                found.append(path)
            else:
                skipped += 1
        top, name = root, root.name
    if not found:
        what = f"holds {skipped:,} files but no image" if skipped else "is empty"
        raise SourceError(f"the source {root} {what}: give a folder with files ending in {_endings()}")
    rows = sorted((uri_of_path(path), path) for path in found)
    images = _table(rows, str(top), labels)
    return Listing(uri_of_path(str(root)), printable(name) or "root", images, skipped, root.is_file())


def _table(rows: list[tuple[str, str]], top: str, labels: Labels) -> pa.Table:
    stats = [os.stat(path) if os.path.exists(path) else None for _, path in rows]
    modified = [datetime.datetime.fromtimestamp(s.st_mtime, datetime.UTC) if s else None for s in stats]
    return pa.table(
        {
            "uri": pa.array([uri for uri, _ in rows], pa.string()),
            "label": pa.array([_label(path, top) if labels == "folder" else None for _, path in rows], pa.string()),
            "num_bytes": pa.array([s.st_size if s else None for s in stats], pa.int64()),
            "modified": pa.array(modified, pa.timestamp("us", tz="UTC")),
        }
    )


def _label(path: str, top: str) -> str | None:
    inside = os.path.relpath(path, top).split(os.sep)
    return printable(inside[0]) if len(inside) > 1 else None


def _walk(root: Path) -> Iterator[str]:
    """Every file under a folder but hidden ones; a folder reached again through a link is not walked twice."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename} cannot be listed ({error.strerror}): give this user the right to read it")

    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            path = os.path.join(folder, name)
            # A link that leads nowhere is listed, and rejected with its reason; a pipe would hang whoever opened it.
            if not name.startswith(".") and (os.path.isfile(path) or not os.path.exists(path)):
                yield path


def _endings() -> str:
    return ", ".join(sorted(SUFFIXES))
