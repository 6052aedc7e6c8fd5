"""Opens the storage behind a path or a URI."""

import re
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.extras import needed_for
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.local import LocalStorage

# A password before the host of a URI and a signature are secrets. They are refused, as a memory's files and messages
# contain URIs.
_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@]*:[^/@]*@", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"[?&](x-amz-signature|x-amz-security-token|x-amz-credential|x-goog-signature|signature|sig|awsaccesskeyid)=",
    re.IGNORECASE,
)


def refuse_secrets(uri: str) -> None:
    """Raises UsageError for a URI with a password or a signature; the message does not repeat the secret."""
    if (found := _PASSWORD.search(uri)) is not None:
        shown = f"{uri[: found.start()]}{found[0].partition('://')[0]}://…@{uri[found.end() :]}"
        raise UsageError(
            f"{shown} holds a password, which would be kept with what is remembered: leave it out, and give it in the "
            "environment (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    if (found := _SIGNATURE.search(uri)) is not None:
        raise UsageError(
            f"{uri.partition('?')[0]}?… is signed, and the signature would be kept with what is remembered: name the "
            "object without it, and give credentials in the environment"
        )


def open_storage(uri: str) -> Storage:
    """The storage behind a path or an fsspec URI. Raises UsageError if it cannot hold a memory."""
    refuse_secrets(uri)
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if "://" in uri:
        # s3fs takes a moment to import, and a folder does not need it.
        with needed_for(f"a memory at {uri}"):
            from pipeline.store.storage.object_store import ObjectStorage

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
