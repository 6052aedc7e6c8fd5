"""The members of a tar archive, plain or compressed, read once from front to back. Nothing is extracted.

This module reads the blocks; the standard library only parses their headers. `tarfile` as a stream ends silently at a
damaged header and at an end without its mark, does not check gzip's checksum, and allocates as much memory for a header
as it claims. An error of the stream itself, such as a lost connection, passes through to the caller unchanged.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from typing import BinaryIO, Protocol, cast

PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
MAX_HEADER_BYTES = 1 << 20  # of an extended header: a path and some attributes
CHUNK_BYTES = 1 << 20  # so that memory grows with what arrives, not with what a header claims

_BLOCK = tarfile.BLOCKSIZE
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_GNU_LONG_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Broken(Exception):
    """The archive breaks off or is damaged. The message is a predicate, such as "is cut off"."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Source:
    """The caller's stream below the decompression. It stores its own error, to distinguish it from damaged data."""

    def __init__(self, stream: BinaryIO) -> None:
        self.lost: BaseException | None = None
        self._stream = stream
        self._ahead = b""

    def read(self, size: int, /) -> bytes:
        if self._ahead:
            found, self._ahead = self._ahead[:size], self._ahead[size:]
            return found
        try:
            return self._stream.read(size)
        except BaseException as error:
            self.lost = error
            raise

    def skip(self, size: int) -> None:
        """Pass some bytes without reading them. A skip beyond the end shows only at the next read."""
        left = max(0, size - len(self._ahead))
        self._ahead = self._ahead[size:]
        try:
            self._stream.seek(left, io.SEEK_CUR)
        except BaseException as error:
            self.lost = error
            raise

    def decompressed(self) -> _Readable:
        """This stream through the decompressor that its first bytes indicate."""
        ahead = b""
        while len(ahead) < 6 and (more := self.read(6 - len(ahead))):
            ahead += more
        self._ahead = ahead
        below = cast("BinaryIO", self)  # the three only need `read`, as long as nobody seeks
        if ahead.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=below, mode="rb")
        if ahead.startswith(b"BZh"):
            return bz2.BZ2File(below)
        if ahead.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMAFile(below)
        return self


class Archive:
    """The members of a tar archive, one after the other: call `next`, then `content` for wanted members.

    With `seeks`, unwanted content of an uncompressed archive is passed by seeking, which the stream must support. If
    the archive is cut off there, this shows at the next header.
    """

    def __init__(self, stream: BinaryIO, *, seeks: bool = False) -> None:
        self._seeks = seeks
        self._position = 0
        self.fault: str | None = "not a tar archive"  # until a header has been read
        self._source = _Source(stream)
        self._plain: _Readable | None = None
        self._common: dict[str, bytes] = {}  # pax records for all members that follow
        self._size = self._padding = 0  # unread bytes of the current member
        self._ended = False

    def next(self) -> tarfile.TarInfo | None:
        """The next member, with its full name and size; None at the end of the archive. Raises Broken."""
        if self._ended:
            return None
        self._skip()
        own: dict[str, bytes] = {}
        while (member := self._header()) is not None:
            if member.type in _PAX_TYPES:
                (self._common if member.type == tarfile.XGLTYPE else own).update(_pax_records(self._extension(member)))
            elif member.type in _GNU_LONG_TYPES:
                name = self._extension(member).partition(b"\0")[0]
                own["path" if member.type == tarfile.GNUTYPE_LONGNAME else "linkpath"] = name
            else:
                self._describe(member, self._common | own)
                return member
        self._check_tail()
        return None

    @property
    def position(self) -> int:
        """The offset in the unpacked archive."""
        return self._position

    @property
    def is_compressed(self) -> bool:
        """Whether the archive is compressed. Known after the first member."""
        return self._plain is not None and self._plain is not self._source

    @property
    def span(self) -> tuple[int, int] | None:
        """Where in the stream the content of the current member lies, as (offset, bytes). Valid before it is read.

        None for a compressed archive.
        """
        return None if self.is_compressed else (self._position, self._size)

    def content(self) -> bytes:
        """The bytes of the current member. Raises Broken; after that `next` returns None."""
        size, self._size = self._size, 0
        self._ended = True
        found = self._exactly(size)
        self._ended = False
        return found

    def _describe(self, member: tarfile.TarInfo, said: dict[str, bytes]) -> None:
        """Apply the extended headers of a member: names beyond 100 bytes, sizes beyond 8 GiB."""
        if any(key.startswith("GNU.sparse.") for key in said):
            member.type = tarfile.GNUTYPE_SPARSE
        name = said.get("GNU.sparse.name", said.get("path"))
        if name is not None:
            member.name = name.decode("utf-8", errors="surrogateescape")
        if "linkpath" in said:
            member.linkname = said["linkpath"].decode("utf-8", errors="surrogateescape")
        if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
            size = said.get("size", b"%d" % member.size)
            if not size.isdigit() or len(size) > 20:
                raise Broken("has a header with an impossible size")
            member.size = int(size)
            self._size, self._padding = member.size, -member.size % _BLOCK

    def _header(self) -> tarfile.TarInfo | None:
        """The next header block, or None for the two blocks of zeros that mark the end."""
        block = self._read(_BLOCK)
        if not block:
            self.fault = self.fault and "the file is empty"
            raise Broken("is cut off, without the mark of its end")
        if not any(block) and len(block) == _BLOCK:
            if any(self._exactly(_BLOCK)):
                raise Broken("has a block of zeros where a header should be")
            return None
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise Broken("is cut off" if len(block) < _BLOCK else f"has a damaged header ({error})") from error
        self.fault = None
        return member

    def _extension(self, member: tarfile.TarInfo) -> bytes:
        """The content of an extended header, which describes the next member or all that follow."""
        if not 0 <= member.size <= MAX_HEADER_BYTES:
            raise Broken(f"has a header of {member.size:,} bytes")
        content = self._exactly(member.size)
        self._exactly(-member.size % _BLOCK)
        return content

    def _check_tail(self) -> None:
        """Read a little beyond the end: gzip's checksum lies there, and archives that `cat` appended to this one."""
        if self._read(CHUNK_BYTES).strip(b"\0"):
            raise Broken("goes on after the mark of its end, like several that were joined")

    def _skip(self) -> None:
        left, self._size, self._padding = self._size + self._padding, 0, 0
        if self._seeks and left and self._plain is self._source:
            self._source.skip(left)
            self._position += left
            return
        while left > 0:
            left -= len(self._exactly(min(left, CHUNK_BYTES)))

    def _exactly(self, size: int) -> bytes:
        found = self._read(size)
        if len(found) < size:
            raise Broken("is cut off")
        return found

    def _read(self, size: int) -> bytes:
        """As many bytes as asked for, fewer only at the end of the stream. Raises Broken for bad compressed data."""
        chunks = []
        try:
            if self._plain is None:
                self._plain = self._source.decompressed()
            while size > 0 and (chunk := self._plain.read(min(size, CHUNK_BYTES))):
                chunks.append(chunk)
                size -= len(chunk)
                self._position += len(chunk)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if error is self._source.lost:
                raise
            raise Broken("is cut off" if isinstance(error, EOFError) else "has damaged compressed data") from error
        return b"".join(chunks)


def _pax_records(content: bytes) -> dict[str, bytes]:
    r"""The records "LENGTH KEY=VALUE\n" of a pax header."""
    found, start = {}, 0
    while start < len(content):
        length, _, _ = content[start : start + 10].partition(b" ")
        end = start + int(length) if length.isdigit() else start
        key, equals, value = content[start + len(length) + 1 : max(start, end - 1)].partition(b"=")
        if not equals or end > len(content):
            raise Broken("has a damaged header (its pax records)")
        found[key.decode("utf-8", errors="replace")] = value
        start = end
    return found
