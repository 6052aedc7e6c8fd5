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
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file: a memory is a folder, so give the path of one")
    return LocalStorage(root)
