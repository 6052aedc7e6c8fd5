"""Where the labels of a source come from (`--labels`), and the text of a value found there."""

import functools
import hashlib
import math
import os
from dataclasses import dataclass

from pipeline.errors import SourceError, UsageError
from pipeline.images.label_files import last_change, read_entry_labels

FORMS = "folder (what the source says: class sub-folders, .cls files, a column label), none, column:NAME or file:PATH"


@dataclass(frozen=True)
class Labels:
    """What `--labels` asks for, as it was written: folder, none, column:NAME or file:PATH."""

    option: str = "folder"

    def __post_init__(self) -> None:
        kind, _, value = self.option.partition(":")
        if self.option not in ("folder", "none") and not (kind in ("column", "file") and value):
            raise UsageError(f"--labels {self.option} is unknown: give {FORMS}")

    @property
    def by_folder(self) -> bool:
        return self.option == "folder"

    @property
    def file(self) -> str | None:
        """The file of labels by uri, if one is to be read."""
        return self.option.removeprefix("file:") if self.option.startswith("file:") else None

    @property
    def sha256(self) -> str:
        """Of the file of labels, so that another one makes another source. Raises SourceError when there is none."""
        try:
            with open(os.path.expanduser(str(self.file)), "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise SourceError(f"the labels {self.file} cannot be read ({error.strerror}): check the path") from error

    @property
    def inside(self) -> str:
        """What to ask of a container about its members: folder, none or column:NAME."""
        return "none" if self.file else self.option

    def of(self, uri: str, below: str, said: str | None) -> str | None:
        """The label of an image: the file's, by its uri or by its uri `below` the source, else what its source said.

        Raises SourceError for a file that cannot be read.
        """
        if self.file is None:
            return said
        by_uri = _read(self.file, last_change(self.file))
        found = by_uri.get(uri)
        return found if found is not None else by_uri.get(below)


@functools.lru_cache(maxsize=1)
def _read(path: str, _: object) -> dict[str, str]:
    by_id, by_uri = read_entry_labels(path)
    if by_id:
        raise SourceError(f"{path} has labels by id, which a source does not have yet: give it columns uri and label")
    return by_uri


def column_of(labels: str) -> str | None:
    """The NAME of "column:NAME"; None for "folder" and "none"."""
    return labels.removeprefix("column:") if labels.startswith("column:") else None


def text_of(value: object) -> str | None:
    """The label a scalar stands for; a null, a NaN, an empty text, a list and an object are no label.

    Whole floats lose their ".0", because a column of integers becomes one of floats as soon as pandas sees a null.
    """
    if value is None or isinstance(value, (dict, list)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    return str(value).encode("utf-8", errors="replace").decode() or None  # JSON can spell half a surrogate pair
