"""Hard links in a tar archive: each names another member, whose bytes come from a second reading."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from pipeline.images.containers.items import Item
from pipeline.images.containers.tar_members import PLAIN_TYPES, Archive, Broken
from pipeline.images.decoding.decode import MAX_FILE_BYTES, Rejected
from pipeline.images.labels.label_rows import plain_name
from pipeline.images.names.uris import printable
from pipeline.images.reading.bounded import KEEP, BoundedFile, check_size

LINKS_FOLLOWED = 4  # from a name to the member that has the bytes
MEMBERS_PASSED = 1 << 15  # before the wanted member: each takes some 20 microseconds
UNPACKED_BYTES = 512 << 20  # of a compressed archive before the wanted member


@dataclass(frozen=True)
class Link:
    """A reference to the bytes of the member `target`."""

    target: str


class Links:
    """The hard links of a first reading of an archive, and the images and sidecars that wait for their bytes.

    Memory: the names of all plain members and of the links.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._plain: set[str] = set()
        self._targets: dict[str, str] = {}
        self._waiting: dict[str, list[Item | str]] = {}

    def note(self, name: str) -> None:
        """Note a plain member. Others may link to it."""
        self._plain.add(plain_name(name))

    def link(self, member: tarfile.TarInfo) -> Link | Rejected:
        """The target of a hard link, or why it cannot be read."""
        target = plain_name(member.linkname)
        if not getattr(self._stream, "seekable", bool)():
            if target not in self._plain:
                return Rejected("read", f"a hard link to {printable(target)}, which is not in the archive before it")
            return Rejected("read", "a hard link, and this stream cannot be read a second time")
        self._targets[plain_name(member.name)] = target
        return Link(target)

    def _final(self, target: str) -> str:
        """The member at the end of a chain of links."""
        seen = {target}
        while (further := self._targets.get(target)) is not None and further not in seen:
            seen.add(further)
            target = further
        return target

    def wait(self, link: Link | Rejected, place: Item | str) -> None:
        """Let an image, or the name of a sidecar, wait for the bytes of a link."""
        if isinstance(link, Link):
            self._waiting.setdefault(link.target, []).append(place)

    def contents(self) -> Iterator[tuple[Item | str, bytes | Rejected, tuple[int, int] | None]]:
        """The images and sidecars that wait, each with its bytes (or why there are none) and span, ordered by target.

        If anything waits, the archive is read again from its beginning up to the last target.
        """
        reason = "which is not in the archive"
        waiting: dict[str, list[Item | str]] = {}
        for target, places in self._waiting.items():
            waiting.setdefault(self._final(target), []).extend(places)
        self._waiting = {}
        try:
            if waiting:
                self._stream.seek(0)
                archive = Archive(self._stream)
                while waiting and (member := archive.next()) is not None:
                    name = plain_name(member.name)
                    if name not in waiting or member.type not in PLAIN_TYPES:
                        continue
                    why, span = unreadable_reason(member), archive.span
                    content = Rejected("read", why) if why is not None else archive.content()
                    yield from ((place, content, span) for place in waiting.pop(name))
        except Broken as broken:
            reason = f"and the archive {broken} before that"
        for target, places in waiting.items():
            reject = Rejected("read", f"a hard link to {printable(target)}, {reason}")
            yield from ((place, reject, None) for place in places)


def unreadable_reason(member: tarfile.TarInfo) -> str | None:
    """Why the bytes of a member that is not a hard link cannot be read; None if they can."""
    if member.issym():
        return "a link, not an image"
    if member.type == tarfile.GNUTYPE_SPARSE:
        return "it is stored as a sparse file: archive it without --sparse"
    if member.type not in PLAIN_TYPES:
        return "a device, a pipe or something else that is not a plain file"
    if member.size > MAX_FILE_BYTES:
        return f"{member.size:,} bytes is more than {MAX_FILE_BYTES:,}"
    return "the file is empty" if member.size == 0 else None


def find_member(file: BoundedFile, name: str) -> bytes:
    """The bytes of a member of an archive without stored offsets. Raises Rejected.

    Other members are passed by seeking, header by header. A compressed archive is read from its beginning.
    """
    if file.is_remote:
        raise Rejected("read", f"it lies in an archive that would have to be fetched whole: {KEEP}")
    wanted = name
    for _ in range(LINKS_FOLLOWED):
        file.seek(0)
        stream = io.BufferedReader(file, tarfile.BLOCKSIZE)
        archive = Archive(cast("BinaryIO", stream), seeks=True)
        try:
            member = _met(archive, wanted)
            if member is None:
                break
            if not member.islnk():
                reason = unreadable_reason(member)
                if reason is not None:
                    raise Rejected("read", reason)
                check_size(member.size)
                return archive.content()
        except Broken as broken:
            raise Rejected("read", f"the archive {broken}") from broken
        finally:
            stream.detach()  # otherwise it closes the file
        wanted = plain_name(member.linkname)
    raise Rejected("read", "the container has no such member")


def _met(archive: Archive, wanted: str) -> tarfile.TarInfo | None:
    """The first member of a name, None if there is none. The archive is then at the content of the member."""
    for _ in range(MEMBERS_PASSED):
        member = archive.next()
        if member is None or wanted in (member.name, plain_name(member.name)):
            return member
        if archive.is_compressed and archive.position > UNPACKED_BYTES:
            break
    raise Rejected("read", f"its archive would have to be read too far, for it was added without offsets: {KEEP}")
