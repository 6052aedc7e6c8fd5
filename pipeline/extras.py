"""The libraries that each extra of the package installs, and the error if a library is missing."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from pipeline.errors import MissingExtra

Extra = Literal["embed", "ray", "serve", "s3"]

BROUGHT_BY: dict[str, Extra] = {
    "torch": "embed",
    "torchvision": "embed",
    "timm": "embed",
    "safetensors": "embed",
    "huggingface_hub": "embed",
    "ray": "ray",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "multipart": "serve",
    "orjson": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "botocore": "s3",
    "s3fs": "s3",
}


@contextlib.contextmanager
def needed_for(work: str) -> Iterator[None]:
    """Raise MissingExtra if a library of an extra is not installed; `work` names the work that needs the library."""
    try:
        yield
    except ImportError as error:  # fsspec raises an ImportError from the ModuleNotFoundError
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        library = (error.name or cause.name or "").partition(".")[0]
        extra = BROUGHT_BY.get(library)
        if extra is None:
            raise
        raise MissingExtra(
            f"{work} needs {library}, which is not installed: pip install 'visual-memory[{extra}]'"
        ) from error
