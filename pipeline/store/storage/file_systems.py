"""fsspec's file systems, with the options for memories and sources."""

from typing import Any

import fsspec

# Stores whose fsspec file system supports exclusive creation. The values are the canonical schemes of a URI.
SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
ATTEMPTS = 2  # of s3fs, each with three attempts of botocore
S3_OPTIONS = {
    # Three attempts for transient errors. An endpoint that accepts no connection fails after about 15 seconds.
    "config_kwargs": {"retries": {"mode": "standard"}, "connect_timeout": 4},
    "max_concurrency": 4,  # parts of 50 MiB in memory at once for each upload or download
}


def file_system_of(scheme: str) -> Any:
    """A file system of fsspec for memories and sources. Raises ValueError or ImportError if there is none."""
    scheme = SCHEMES.get(scheme, scheme)
    fresh = {"use_listings_cache": False, "skip_instance_cache": True}  # other processes write there too
    files: Any = fsspec.filesystem(scheme, **fresh, **(S3_OPTIONS if scheme == "s3" else {}))
    if scheme == "s3":
        files.retries = ATTEMPTS
    return files
