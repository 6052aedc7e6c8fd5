"""The Parquet file of a source that describes the rows of a .npy, by the names of the two.

img_emb/img_emb_0.npy     metadata/metadata_0.parquet     as clip-retrieval writes them, text_emb/ beside
NAME.npy                  NAME.parquet
"""

import re
from collections.abc import Callable, Iterable
from typing import Literal

VectorKind = Literal["npy", "npy+parquet", "npy+metadata", "vectors"]  # the last: a column of a Parquet file

_IMAGES = re.compile(r"(?P<above>(?:.*/)?)img_emb/img_emb_(?P<name>[^/]+)\.npy")
_TEXTS = re.compile(r"(?P<above>(?:.*/)?)text_emb/[^/]+\.npy")
_METADATA = re.compile(r"(?P<above>(?:.*/)?)metadata/[^/]+\.parquet")


def beside(uri: str, kind: str) -> str | None:
    """The uri of the Parquet file beside a .npy of this kind; None if the kind has none."""
    if kind == "npy+parquet":
        return f"{uri[: -len('.npy')]}.parquet"
    found = _IMAGES.fullmatch(uri) if kind == "npy+metadata" else None
    return f"{found['above']}metadata/metadata_{found['name']}.parquet" if found else None


def possible_pairs(uri: str) -> list[tuple[VectorKind, str]]:
    """The kinds that a .npy may have by its name, each with the uri of the file beside it, the likeliest first."""
    kinds: tuple[VectorKind, ...] = ("npy+metadata", "npy+parquet")
    return [(kind, place) for kind in kinds if (place := beside(uri, kind)) is not None]


def unpaired(uris: Iterable[str]) -> Callable[[str], bool]:
    """A test for files of clip-retrieval that are not sources of their own: embeddings of texts, and metadata."""
    tops = {found["above"] for uri in uris if (found := _IMAGES.fullmatch(uri))}

    def is_passed_over(uri: str) -> bool:
        found = _TEXTS.fullmatch(uri) or _METADATA.fullmatch(uri)
        return found is not None and found["above"] in tops

    return is_passed_over
