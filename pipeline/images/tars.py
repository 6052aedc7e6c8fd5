"""Tar archives in the manner of webdataset: images, and beside each the sidecars that describe it."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.errors import SourceError
from pipeline.images.decode import MAX_FILE_BYTES, Rejected
from pipeline.images.items import Item
from pipeline.images.labels import column_of, text_of
from pipeline.images.suffixes import IMAGES
from pipeline.images.tar_members import PLAIN_TYPES, Archive, Broken
from pipeline.images.uris import member_uri, printable
from pipeline.store.kept import KeptColumn, value_of

MAX_IMAGES = 1 << 20  # rows of a part: 20 bits of an id
MAX_SIDECAR_BYTES = 1 << 20  # a label is text of a few bytes; what is larger is something else
HELD_BYTES = 64 << 20  # what the images of one key may take while their sidecars are awaited
JSON_LABELS = ("label", "cls", "class")


def read_tar(stream: BinaryIO, uri: str, labels: str, kept: Sequence[KeptColumn] = ()) -> Iterator[Item]:
    """The images of a tar archive, plain or compressed with gzip, bzip2 or xz, in order of position.

    `stream` need not be seekable. `labels` is "none"; or "column:NAME": NAME in the `.json` beside an image, else the
    sidecar with that extension; or "folder": the first there is of the `.cls`, the label in the `.json`, the `.txt`,
    and the first folder of the image's path. Sidecars lie next to the image and share its path up to the first dot of
    the base name; when the images of one such key take more than `HELD_BYTES`, only the sidecars before them count.
    The values of kept columns are found as those of "column:NAME".

    What cannot be read is an `Item` with a `Rejected`; one under the archive's own uri comes last when the archive
    breaks off between two images. Raises SourceError beyond `MAX_IMAGES`, and whatever `stream.read` raises.
    """
    for position, item in enumerate(_items(Archive(stream), uri, labels, kept)):
        if position == MAX_IMAGES:
            raise SourceError(f"{uri} holds more than {MAX_IMAGES:,} images: split it into several archives")
        yield item


def _items(archive: Archive, uri: str, labels: str, kept: Sequence[KeptColumn]) -> Iterator[Item]:
    wanted = _wanted(labels, kept)
    names: set[str] = set()
    num_images = 0
    group = _Group("")
    try:
        while (member := archive.next()) is not None:
            if member.isdir() or _is_hidden(member.name):
                continue
            key, extension = _split(member.name)
            if key != group.key:
                yield from group.items(uri, labels, kept)
                group = _Group(key)
            if _is_image(member.name):
                num_images += 1
                content = _content(archive, member, names)
                num_bytes = len(content) if isinstance(content, bytes) else 0
                if group.held_bytes + num_bytes > HELD_BYTES:
                    yield from group.items(uri, labels, kept)
                    group = _Group(key, sidecars=group.sidecars)
                group.images.append((member.name, content))
                group.held_bytes += num_bytes
            elif extension in wanted and member.type in PLAIN_TYPES and member.size <= MAX_SIDECAR_BYTES:
                group.sidecars.setdefault(extension, archive.content())
    except Broken as broken:
        yield from group.items(uri, labels, kept)
        reason = archive.fault or f"the archive breaks off after {num_images:,} images: it {broken}"
        yield Item(uri, None, Rejected("read", reason))
    else:
        yield from group.items(uri, labels, kept)


def _content(archive: Archive, member: tarfile.TarInfo, names: set[str]) -> bytes | Rejected:
    """The bytes of a member with the name of an image, or why there are none. Adds its name to those seen."""
    if member.name in names:
        return Rejected("plan", "its name is in the archive already")
    names.add(member.name)
    if member.issym() or member.islnk():
        return Rejected("read", "a link, not an image")
    if member.type == tarfile.GNUTYPE_SPARSE:
        return Rejected("read", "it is stored as a sparse file: archive it without --sparse")
    if member.type not in PLAIN_TYPES:
        return Rejected("read", "a device, a pipe or something else that is not a plain file")
    if member.size > MAX_FILE_BYTES:
        return Rejected("read", f"{member.size:,} bytes is more than {MAX_FILE_BYTES:,}")
    if member.size == 0:
        return Rejected("read", "the file is empty")
    try:
        return archive.content()
    except Broken as broken:
        return Rejected("read", f"the archive {broken} here")


@dataclass
class _Group:
    """Neighbours of one key. The images wait until the key changes, because a sidecar may follow its image."""

    key: str
    images: list[tuple[str, bytes | Rejected]] = field(default_factory=list)
    sidecars: dict[str, bytes] = field(default_factory=dict)
    held_bytes: int = 0

    def items(self, uri: str, labels: str, kept: Sequence[KeptColumn]) -> Iterator[Item]:
        described = self._described()
        values = tuple(value_of(self._column(column.name, described), column.kind) for column in kept)
        for name, content in self.images:
            yield Item(member_uri(uri, name), self._label(name, described, labels), content, values)

    def _label(self, name: str, described: dict[str, object], labels: str) -> str | None:
        if labels == "none":
            return None
        column = column_of(labels)
        if column is not None:
            return self._column(column, described)
        if "cls" in self.sidecars:
            return self._text("cls")
        for key in JSON_LABELS:
            if key in described:
                return text_of(described[key])
        if "txt" in self.sidecars:
            return self._text("txt")
        folders = [part for part in name.split("/")[:-1] if part not in ("", ".", "..")]
        return printable(folders[0]) if folders else None

    def _column(self, name: str, described: dict[str, object]) -> str | None:
        """A field of the `.json`, else the sidecar with that extension."""
        return text_of(described[name]) if name in described else self._text(name.lower())

    def _text(self, extension: str) -> str | None:
        content = self.sidecars.get(extension)
        return None if content is None else text_of(content.decode("utf-8-sig", errors="replace").strip())

    def _described(self) -> dict[str, object]:
        try:
            found = json.loads(self._text("json") or "null")
        except (ValueError, RecursionError):  # not JSON, or nested to make the parser stumble: it names no label
            return {}
        return found if isinstance(found, dict) else {}


def _wanted(labels: str, kept: Sequence[KeptColumn]) -> set[str]:
    """The extensions of sidecars that say something."""
    column = column_of(labels)
    columns = [kept_column.name for kept_column in kept] + ([] if column is None else [column])
    wanted = {"json", *(name.lower() for name in columns)} if columns else set()
    return wanted | {"cls", "json", "txt"} if column is None and labels != "none" else wanted


def _split(name: str) -> tuple[str, str]:
    """Webdataset's key of a member, up to the first dot of its base name, and its extension, all that follows."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _is_image(name: str) -> bool:
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f"{dot}{suffix}".lower() in IMAGES


def _is_hidden(name: str) -> bool:
    """What a desktop leaves behind: hidden files, the "._" twins and the __MACOSX folder of macOS."""
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))
