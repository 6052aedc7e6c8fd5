"""The options for the labels of a source (`--labels`, `--label`), and the labels that they give."""

import functools
import hashlib
import os
from dataclasses import dataclass, field

from pipeline.errors import SourceError, UsageError
from pipeline.images.labels.label_rows import LABEL_COLUMNS, LabelFile, read_label_file
from pipeline.images.labels.label_text import clean_label, text_of
from pipeline.images.names.partitions import partition_columns
from pipeline.images.names.uris import path_of_uri, printable

FORMS = (
    "folder (what the source says: class sub-folders, .cls files, a column label), parent (the folder that holds the "
    "image), none, column:NAME or file:PATH"
)

NO_FOLDER = "it lies in no sub-folder, and nothing else names its label"
NO_LABEL_IN_LIST = "its row in the list of uris names no label"
NO_ROW = "no row of the label file names it"
EMPTY_ROW = "its row in the label file has an empty label"
NOT_ASKED = "labels were not asked for"


@dataclass(frozen=True)
class Labels:
    """The option `--labels` as written: folder, parent, none, column:NAME or file:PATH; or label:NAME.

    "label:NAME" comes from `--label NAME` and gives every image this label. `root` is the uri of the source (a folder,
    or a single file): a label file may name images relative to it.
    """

    option: str = "folder"
    root: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        kind, _, value = self.option.partition(":")
        if self.option not in ("folder", "parent", "none") and not (kind in ("column", "file", "label") and value):
            raise UsageError(f"`labels` {self.option} is unknown: give {FORMS}")
        if kind == "label" and text_of(value) is None:
            raise UsageError("`label` is empty: give the name of the class")

    @property
    def file(self) -> str | None:
        """The path of the label file, None without one."""
        return self.option.removeprefix("file:") if self.option.startswith("file:") else None

    @property
    def fixed(self) -> str | None:
        """The one label of all images, None if none was given."""
        return text_of(self.option.removeprefix("label:")) if self.option.startswith("label:") else None

    @property
    def sha256(self) -> str:
        """The hash of the label file: another file makes another source. Raises SourceError if it cannot be read."""
        try:
            with open(os.path.expanduser(str(self.file)), "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise SourceError(f"the labels {self.file} cannot be read ({error.strerror}): check the path") from error

    @property
    def inside(self) -> str:
        """The option for the members of a container: folder, parent, none or column:NAME."""
        return "none" if self.file or self.fixed else self.option

    def of_path(self, uri: str, below: str, source_name: str) -> str | None:
        """The label that the folders of an image file give; `below` is its uri relative to the source.

        `source_name` is the name of the source's own folder: "parent" takes it for an image directly in the source.
        Doubled slashes make no folder. A folder such as label=cat, as Hive writes partitions, gives its value.
        """
        if self.fixed is not None:
            return self.fixed
        partition = partition_label(uri, self.inside) if "=" in uri else None
        if partition is not None:
            return partition[1]
        folders = [step for step in below.split("/")[:-1] if step]
        if self.option == "folder":
            return _label_of_folder(folders[0]) if folders else None
        if self.option != "parent":
            return None
        return _label_of_folder(folders[-1]) if folders else clean_label(source_name)

    def of_member(self, uri: str, said: str | None) -> str | None:
        """The label of an image in a container that gives it the label `said`. Raises SourceError for a bad file."""
        if self.fixed is not None:
            return self.fixed
        file = self.read_file()
        return said if file is None else file.label_of(uri, self.root)

    def read_file(self) -> LabelFile | None:
        """The label file, None without one. It is read once. Raises SourceError."""
        return None if self.file is None else read_label_file(self.file)

    def why_none(self, uri: str, said: str) -> str:
        """Why the image at a uri has no label; `said` is the reason that its source gives."""
        file = self.read_file()
        if file is not None:
            return self.why_no_label_in_file(file.row_of(uri, self.root))
        if self.option == "none":
            return NOT_ASKED
        column = column_of(self.option)
        return said if column is None or said != NO_FOLDER else f"no folder {column}=VALUE holds it"

    def why_no_label_in_file(self, row: int | None) -> str:
        """Why an image has no label; `row` is the row of the label file that names it, or None."""
        return NO_ROW if row is None else EMPTY_ROW


@functools.lru_cache(maxsize=4_096)
def _label_of_folder(name: str) -> str | None:
    return clean_label(printable(path_of_uri(name)))


def column_of(labels: str) -> str | None:
    """The NAME of "column:NAME"; None for other options."""
    return labels.removeprefix("column:") if labels.startswith("column:") else None


def partition_label(uri: str, labels: str) -> tuple[str, str | None] | None:
    """The column and the label from the folders of a file, as Hive writes partitions; None if they give none.

    `labels` is the option for containers (`Labels.inside`).
    """
    partitions = partition_columns(uri)
    column = column_of(labels)
    if column is not None:
        return (column, clean_label(partitions[column])) if column in partitions else None
    if labels not in ("folder", "parent"):
        return None
    by_lower = {name.lower(): name for name in partitions}
    name = next((by_lower[name] for name in LABEL_COLUMNS if name in by_lower), None)
    return None if name is None else (name, clean_label(partitions[name]))
