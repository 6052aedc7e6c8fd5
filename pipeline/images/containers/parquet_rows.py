"""Reading of one image from a Parquet file: only the page that holds its row is read and unpacked.

pyarrow reads a row group from its beginning, and allocates as much memory for a page as its header claims. This module
walks the headers of the pages, or uses the file's own page index, and checks sizes first. It refuses what few writers
use (lists, delta encodings, encryption, LZO). The format: https://github.com/apache/parquet-format.
"""

import contextlib
import itertools
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.images.containers.parquet import MAX_GROUP_ROWS, inspect
from pipeline.images.decoding.decode import Rejected
from pipeline.images.reading.bounded import KEEP, BoundedFile
from pipeline.images.reading.thrift import Broken, Struct, read_struct

FOOTER_BYTES = 4 << 20
PAGE_BYTES = 128 << 20  # of an unpacked page: pyarrow puts 1,024 images into one
LARGE_BYTES = 16 << 20  # pages above this size are unpacked one at a time
HEADER_BYTES = (512, 16 << 10, 1 << 20)  # read in turn for a page header, which may hold two values as statistics

_unpacking = threading.Lock()
_ROW = re.compile(r"row=(0|[1-9]\d{0,17})")
_TAIL = 8
_OPTIONAL, _REPEATED = 1, 2
_BYTE_ARRAY = 6
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_PLAIN, _BY_DICTIONARY = 0, {2, 8}
_CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_OTHER = f"the file holds it in a way that is not read for a picture: {KEEP}"
_DAMAGED = "the row group is damaged"


@dataclass(frozen=True)
class _Chunk:
    """The column chunk of the images in one row group."""

    start: int
    stop: int
    codec: str | None
    levels: int  # how many elements of the path can be null
    index: tuple[int, int] | None  # of the page index: offset and bytes


@dataclass(frozen=True)
class _Page:
    header: Struct
    data: int  # the offset of what follows the header


def read_row(file: BoundedFile, uri: str, member: str) -> bytes:
    """The bytes of the image in a row, named as "row=17". Raises Rejected."""
    named = _ROW.fullmatch(member)
    if named is None:
        raise Rejected("read", "the container has no such member")
    try:
        layout = inspect(file, uri, "none")  # type: ignore[arg-type]  # read, seek and tell are all it asks for
        column = [layout.columns.image, "bytes"] if layout.columns.in_struct else [layout.columns.image]
        row, group = int(named[1]), 0
        while group < len(layout.rows) and row >= layout.rows[group]:
            row, group = row - layout.rows[group], group + 1
        if group == len(layout.rows):
            raise Rejected("read", "the container has no such member")
        chunk = _chunk(_footer(file), group, column)
        found = _value(file, chunk, row)
    except SourceError as error:  # the file has changed
        raise Rejected("read", str(error)) from error
    except (Broken, IndexError, KeyError, TypeError, ValueError, struct.error, pa.ArrowException, OSError) as error:
        raise Rejected("read", _DAMAGED) from error
    if not found:
        raise Rejected("read", "there are no bytes in the row")
    return found


def _footer(file: BoundedFile) -> Struct:
    tail = file.span(file.size - _TAIL, _TAIL)
    size = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or size > FOOTER_BYTES:
        raise Rejected("read", _OTHER)
    footer, _ = read_struct(file.span(file.size - _TAIL - size, size))
    return footer


def _chunk(footer: Struct, group: int, column: list[str]) -> _Chunk:
    levels = _levels(footer[2], column)
    path = [name.encode() for name in column]
    [chunk] = [each for each in footer[4][group][1] if each[3][3] == path]
    said = chunk[3]
    if said[1] != _BYTE_ARRAY or chunk.get(1) or said[4] not in _CODECS:
        raise Rejected("read", _OTHER)
    start = min(said[9], said.get(11) or said[9])  # the first page with values, and the dictionary page
    index = (chunk[4], chunk[5]) if chunk.get(4) and chunk.get(5) else None
    return _Chunk(start, start + said[7], _CODECS[said[4]], levels, index)


def _levels(elements: list[Struct], column: list[str]) -> int:
    """How many elements on the path to a column can be null. `elements` is the tree of the schema, depth first."""
    optional, at = 0, 0
    for name in column:
        children, at = elements[at][5], at + 1
        for _ in range(children):
            if elements[at][4] == name.encode():
                break
            at = _behind(elements, at)
        else:
            raise Broken
        if elements[at].get(3) == _REPEATED:
            raise Rejected("read", _OTHER)
        optional += elements[at].get(3) == _OPTIONAL
    return optional


def _behind(elements: list[Struct], at: int) -> int:
    """The index of the element after this one and its descendants."""
    left = 1
    while left:
        left += elements[at].get(5, 0) - 1
        at += 1
    return at


def _value(file: BoundedFile, chunk: _Chunk, row: int) -> bytes | None:
    page, before = _page_of(file, chunk, row)
    header = page.header
    if header[1] == _DATA:
        said = header[5]
        content = _unpacked(chunk, file.span(page.data, header[3]), header[2])
        size = int.from_bytes(content[:4], "little") if chunk.levels else 0
        levels, values = (content[4 : 4 + size], content[4 + size :]) if chunk.levels else (b"", content)
        count, encoding = said[1], said[2]
    else:
        said = header[8]
        packed = file.span(page.data, header[3])
        levels, rest, around = packed[: said[5]], packed[said[5] + said[6] :], said[5] + said[6]
        values = _unpacked(chunk, rest, header[2] - around) if said.get(7, True) else rest
        count, encoding = said[1], said[4]
    at = row - before
    if chunk.levels:
        there_N = _hybrid(levels, chunk.levels.bit_length(), count) == chunk.levels
        if not there_N[at]:
            return None
        at = int(there_N[:at].sum())
    if encoding == _PLAIN:
        return _plain(values, at)
    if encoding not in _BY_DICTIONARY:
        raise Rejected("read", _OTHER)
    entry = int(_hybrid(values[1:], values[0], at + 1)[at])
    dictionary = _page_at(file, chunk.start, chunk.stop)  # it comes before all other pages
    if dictionary.header[1] != _DICTIONARY:
        raise Broken
    packed = file.span(dictionary.data, dictionary.header[3])
    return _plain(_unpacked(chunk, packed, dictionary.header[2]), entry)


def _page_of(file: BoundedFile, chunk: _Chunk, row: int) -> tuple[_Page, int]:
    """The page with a row of the row group, and the number of rows before it."""
    if chunk.index is not None:
        places, _ = read_struct(file.span(*chunk.index))
        holding = [place for place in places[1] if place.get(3, 0) <= row]
        return _page_at(file, holding[-1][1], chunk.stop), holding[-1].get(3, 0)
    before = 0
    for page in _pages(file, chunk):
        rows = _rows(page.header)
        if before + rows > row:
            return page, before
        before += rows
    raise Broken


def _pages(file: BoundedFile, chunk: _Chunk) -> Iterator[_Page]:
    at = chunk.start
    while at < chunk.stop:
        page = _page_at(file, at, chunk.stop)
        if page.header[3] < 0 or page.data <= at:
            raise Broken
        yield page
        at = page.data + page.header[3]


def _page_at(file: BoundedFile, at: int, stop: int) -> _Page:
    for size in HEADER_BYTES:
        looked_at = file.span(at, min(size, stop - at))
        try:
            header, length = read_struct(looked_at)
        except Broken:
            if len(looked_at) < size or size == HEADER_BYTES[-1]:
                raise
            continue
        return _Page(header, at + length)
    raise Broken


def _rows(header: Mapping[int, Any]) -> int:
    if header[1] not in (_DATA, _DATA_2):
        return 0
    rows: int = header[5][1] if header[1] == _DATA else header[8][3]
    if rows < 0:
        raise Broken
    return rows


def _unpacked(chunk: _Chunk, packed: bytes, size: int) -> bytes:
    if not 0 <= size <= PAGE_BYTES:
        raise Rejected("read", f"its page takes {size:,} bytes when it is unpacked, too many for a picture: {KEEP}")
    if chunk.codec is None or not size:
        return packed
    with _unpacking if size > LARGE_BYTES else contextlib.nullcontext():
        found: bytes = pa.Codec(chunk.codec).decompress(packed, decompressed_size=size, asbytes=True)
    return found


def _plain(values: bytes, at: int) -> bytes:
    """Value number `at`; each value has its length before it."""
    start = 0
    for _ in itertools.repeat(None, at):
        start += 4 + int.from_bytes(values[start : start + 4], "little")
    size = int.from_bytes(values[start : start + 4], "little")
    if start + 4 + size > len(values):
        raise Broken
    return values[start + 4 : start + 4 + size]


def _hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """Numbers of `width` bits that Parquet packs in runs of equal ones and in groups of eight (int64 [count])."""
    if not (0 <= width <= 32 and 0 <= count <= MAX_GROUP_ROWS):
        raise Broken
    found_N = np.zeros(count, np.int64)
    done = at = 0
    while done < count:
        header, at = _varint(data, at)
        if header & 1:
            groups = header >> 1
            take = min(8 * groups, count - done)
            bits = np.unpackbits(np.frombuffer(data[at : at + groups * width], np.uint8), bitorder="little")
            values_N = bits[: take * width].reshape(take, width) @ (1 << np.arange(width, dtype=np.int64))
            at += groups * width
        else:
            take, size = min(header >> 1, count - done), -(-width // 8)
            values_N = np.full(take, int.from_bytes(data[at : at + size], "little"))
            at += size
        if not take:
            raise Broken
        found_N[done : done + take] = values_N
        done += take
    return found_N


def _varint(data: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        byte = data[at]
        found |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80 or shift > 63:
            return found, at
