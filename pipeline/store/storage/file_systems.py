"""fsspec's file systems as memories and sources use them."""

from typing import Any

import fsspec

# Stores whose fsspec file system creates exclusively, under the one name that a URI is given.
SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
ATTEMPTS = 2  # of s3fs at what botocore gave up after three of its own
S3_OPTIONS = {
    # Three attempts at what is transient; an endpoint that takes no connection is given up after some 15 seconds.
    "config_kwargs": {"retries": {"mode": "standard"}, "connect_timeout": 4},
    "max_concurrency": 4,  # parts of 50 MiB in memory at once for each file that is sent or fetched
}


def file_system_of(scheme: str) -> Any:
    """A file system of fsspec as memories and sources use it. Raises ValueError or ImportError where there is none."""
    scheme = SCHEMES.get(scheme, scheme)
    fresh = {"use_listings_cache": False, "skip_instance_cache": True}  # other processes write there too
    files: Any = fsspec.filesystem(scheme, **fresh, **(S3_OPTIONS if scheme == "s3" else {}))
    if scheme == "s3":
        files.retries = ATTEMPTS
    return files
