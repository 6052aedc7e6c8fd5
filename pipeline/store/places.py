"""Which storage is behind a path or a URI."""

from pathlib import Path

from pipeline.errors import UsageError
from pipeline.store.local import LocalStorage
from pipeline.store.storage import Storage


def open_storage(uri: str) -> Storage:
    """The storage behind a path or an fsspec URI. Raises UsageError for one that cannot hold a memory."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if "://" in uri:
        from pipeline.store.objects import ObjectStorage  # s3fs takes a moment to load, and a folder has no need of it

        return ObjectStorage.open(uri)
    root = Path(uri).expanduser().absolute()
    try:
        str(root).encode()
    except UnicodeEncodeError as error:
        shown = str(root).encode(errors="backslashreplace").decode()
        raise UsageError(
            f"{shown} is no UTF-8, and the libraries that read a memory open no such path: rename the folder, or give "
            "a link to it that has a name in UTF-8"
        ) from error
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file: a memory is a folder, so give the path of one")
    return LocalStorage(root)
