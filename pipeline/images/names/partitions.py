"""Columns that a path gives, as Hive, Spark, pyarrow and Ray Data write partitions: `label=cat/part-0.parquet`."""

import functools
import urllib.parse

from pipeline.images.names.uris import path_of_uri, printable

NULL_VALUES = {"", "__HIVE_DEFAULT_PARTITION__", "__HIVE_NULL__"}  # what Hive, Spark and pyarrow write for a null


def partition_columns(uri: str) -> dict[str, str | None]:
    """The columns that the folders of a file's uri name as NAME=VALUE, the deepest folder last; a null is None.

    A value is percent-decoded, because pyarrow and Spark encode it. The part of a uri after "#", which is inside a
    container, is ignored.
    """
    folders = uri.partition("#")[0].rpartition("/")[0]
    return _columns(folders) if "=" in folders else {}


@functools.lru_cache(maxsize=4_096)
def _columns(folders: str) -> dict[str, str | None]:
    columns: dict[str, str | None] = {}
    for folder in folders.split("/"):
        name, equals, value = path_of_uri(folder).partition("=")
        name = name.strip()
        if not equals or not name:
            continue
        columns.pop(name, None)  # the deepest folder of a name counts, and comes last
        text = printable(urllib.parse.unquote(value, errors="surrogateescape"))
        columns[name] = None if text in NULL_VALUES else text
    return columns
