"""The files of a source, as a walk or a list of uris gives them."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class SourceFile(NamedTuple):
    """A file of a source; `below` is its uri relative to the source.

    A list of uris gives `label` and the values of the `kept` columns too.
    """

    uri: str
    below: str
    num_bytes: int | None
    modified: datetime.datetime | None
    label: str | None = None
    kept: tuple = ()


@dataclass(frozen=True)
class Walk:
    """The files of a source at a uri. `name` is the name of its folder, `is_file` whether it is a single file."""

    uri: str
    name: str
    is_file: bool
    files: Iterator[SourceFile]
