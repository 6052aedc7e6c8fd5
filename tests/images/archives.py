"""Tar archives and streams that misbehave, made on the spot."""

import io
import tarfile
from collections.abc import Mapping


def tar_of(members: Mapping[str, bytes] | list[tuple[str, bytes]], mode: str = "w", **options: object) -> bytes:
    """A tar archive of files in the order given; `mode` and `options` as tarfile.open has them."""
    stream = io.BytesIO()
    pairs = list(members.items()) if isinstance(members, Mapping) else members
    with tarfile.open(fileobj=stream, mode=mode, **options) as archive:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


class Dribble:
    """A stream that has nothing but read, and gives at most a few bytes at a time, as a socket may."""

    def __init__(self, content: bytes, at_most: int = 7) -> None:
        self.stream = io.BytesIO(content)
        self.at_most = at_most

    def read(self, size: int = -1) -> bytes:
        return self.stream.read(min(size, self.at_most) if size >= 0 else self.at_most)


class Lost(io.BytesIO):
    """A stream whose connection is lost once `good` bytes have been read."""

    def __init__(self, content: bytes, good: int, error: Exception) -> None:
        super().__init__(content)
        self.left = good
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.left -= len(found)
        if self.left < 0:
            raise self.error
        return found
