"""The head of a .npy file with vectors, read without executing anything in it."""

import io
import threading
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from pipeline.errors import SourceError

MAX_DIMENSION = 1 << 16
MAX_HEADER_BYTES = 10_000  # NumPy's own limit

_PARSING = threading.Lock()  # NumPy parses the header with ast, which fails in Python 3.11 in two threads at once


class NoVectors(SourceError):
    """A file holds no embeddings, although its name suggests some. Internal: callers decide what to do."""


@dataclass(frozen=True)
class Header:
    """The offset of the rows in bytes, their number, their dimension and their dtype."""

    offset: int
    rows: int
    dimension: int
    dtype: np.dtype


def read_header(stream: BinaryIO, uri: str) -> Header:
    """The header of a .npy that has all its rows. Raises SourceError, NoVectors for an array of another kind."""
    numpy_format = np.lib.format
    stream.seek(0)
    head = io.BytesIO(stream.read(MAX_HEADER_BYTES + 12))  # magic and length come before the header
    try:
        with _PARSING:
            version = numpy_format.read_magic(head)  # type: ignore[no-untyped-call]
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the format")
            first = version == (1, 0)
            read = numpy_format.read_array_header_1_0 if first else numpy_format.read_array_header_2_0
            shape, by_columns, dtype = read(head)  # type: ignore[no-untyped-call]
    except Exception as error:  # on damage Python's parser and tokenizer raise errors of many types
        raise SourceError(f"{uri} is no .npy file, or is cut short: write or copy it again") from error
    if dtype.hasobject:
        raise SourceError(f"{uri} holds Python objects, which are never unpickled: save a float16 or float32 array")
    if len(shape) != 2 or dtype.kind != "f" or dtype.itemsize > 8:
        raise NoVectors(
            f"{uri} holds {dtype} of shape {shape} and no embeddings: save a float16 or float32 array of rows by "
            "dimensions"
        )
    rows, dimension = (int(length) for length in shape)
    if by_columns and min(shape) > 1:
        raise SourceError(f"{uri} is stored column by column: save numpy.ascontiguousarray of it")
    if not 1 <= dimension <= MAX_DIMENSION:
        raise SourceError(f"{uri} has vectors of {dimension:,} dimensions: save those of an encoder")
    offset = head.tell()
    size = stream.seek(0, io.SEEK_END)
    if size < offset + rows * dimension * dtype.itemsize:
        raise SourceError(
            f"{uri} is cut short: it has {size:,} bytes where {rows:,} x {dimension:,} {dtype} need "
            f"{offset + rows * dimension * dtype.itemsize:,}; write or copy it again"
        )
    return Header(offset, rows, dimension, dtype)
