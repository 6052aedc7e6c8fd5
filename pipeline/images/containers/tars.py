"""Tar archives as webdataset writes them: images, and beside each the sidecars that describe it."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from pipeline.errors import SourceError
from pipeline.images.containers.items import Item
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.containers.tar_links import Link, Links, unreadable_reason
from pipeline.images.containers.tar_members import PLAIN_TYPES, Archive, Broken
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.label_text import text_of, text_of_bytes, why_no_label
from pipeline.images.labels.labels import column_of, partition_label
from pipeline.images.labels.samples import Sidecars, is_image, is_mask, is_plain_picture, mask_ending, sample_of
from pipeline.images.names.leftovers import Exclusion, leftover_of
from pipeline.images.names.uris import member_uri, printable
from pipeline.store.tables.kept_columns import KeptColumn, value_of

MAX_IMAGES = 1 << 20  # rows of a part: 20 bits of an id
MAX_SIDECAR_BYTES = 1 << 20  # a label is text of a few bytes; a larger file is something else
HELD_BYTES = 64 << 20  # of the images of one sample that wait for their sidecars
JSON_LABELS = ("label", "cls", "class", "labels", "category", "target")
SIDECARS = {"cls", "json", "txt"}  # these may describe an image, and are never reported as passed over


@dataclass(frozen=True)
class Members:
    """Which members of an archive are taken as images, and which labels and kept columns are read with them.

    `labels` is folder, parent, none or column:NAME. With `extension` "jpg" only images whose names end in ".jpg" are
    taken, with "seg.png" only those that end in ".seg.png".
    """

    labels: str = "folder"
    kept: tuple[KeptColumn, ...] = ()
    extension: str | None = None
    exclusion: Exclusion = Exclusion()

    @property
    def wanted(self) -> set[str]:
        """The extensions of the sidecars that are read."""
        column = column_of(self.labels)
        columns = [kept.name for kept in self.kept] + ([] if column is None else [column])
        wanted = {"json", *(name.lower() for name in columns)} if columns else set()
        return wanted | SIDECARS if column is None and self.labels != "none" else wanted


def read_tar(
    stream: BinaryIO, uri: str, members: Members = Members(), notes: ContainerNotes | None = None
) -> Iterator[Item]:
    """The images of a tar archive, plain or compressed with gzip, bzip2 or xz, in order of position.

    `stream` need not be seekable. For "column:NAME" a label is NAME in the `.json` beside an image, else the sidecar
    with that extension. For "folder" it is the first that exists of: the `.cls`, the label in the `.json`, the `.txt`,
    the archive's own folder if it is a partition (label=cat), the first folder of the image's path. "parent" takes the
    last folder of the path instead. The values of kept columns are read like those of "column:NAME".

    Sidecars share the image's path up to any dot of the base name; the longest such path counts first. They should lie
    next to the image. Sidecars that come later, or lie elsewhere, are in `notes` when the archive ends: `notes.amended`
    has the final labels. A hard link has the bytes of the member it links to. It comes last, and costs a second reading
    of the archive.

    What cannot be read is an `Item` with a `Rejected`. If the archive breaks off between two images, an item under the
    archive's own uri comes last. Raises SourceError beyond `MAX_IMAGES`, and whatever `stream.read` raises.
    """
    reader = _Reader(stream, uri, members, notes or ContainerNotes())
    for position, item in enumerate(reader.items()):
        if position == MAX_IMAGES:
            raise SourceError(f"{uri} holds more than {MAX_IMAGES:,} images: split it into several archives")
        yield item


@dataclass
class _Group:
    """Adjacent members of one sample. The images wait until the sample changes: a sidecar may follow its image."""

    key: str
    images: list[tuple[str, bytes | Rejected | Link]] = field(default_factory=list)
    sidecars: Sidecars = field(default_factory=Sidecars)
    held_bytes: int = 0


@dataclass(frozen=True)
class _Both:
    """The sidecars beside an image (`near`); others (`far`) are used if one is missing there."""

    near: Sidecars
    far: Sidecars

    def of(self, image: str, extension: str) -> bytes | None:
        found = self.near.of(image, extension)
        return self.far.of(image, extension) if found is None else found


class _Reader:
    def __init__(self, stream: BinaryIO, uri: str, members: Members, notes: ContainerNotes) -> None:
        self._stream = stream
        self._archive = Archive(stream)
        self._uri = uri
        self._members = members
        self._notes = notes
        self._wanted = members.wanted
        self._column = column_of(members.labels)
        self._partition = partition_label(uri, members.labels)
        self._taken: set[str] = set()  # names of members that are images
        self._links = Links(stream)
        self._spans: dict[str, tuple[int, int] | None] = {}  # of the images of the current sample
        self._loose = Sidecars(HELD_BYTES)  # sidecars that lie next to no image of their sample
        self._given_images: list[tuple[str, Sidecars | None]] = []  # with their sidecars, while memory permits
        self._held_bytes = 0
        self._samples: dict[str, bool] = {}  # samples given; True if one of their pictures has a plain name

    def items(self) -> Iterator[Item]:
        group = _Group("")
        broken: Broken | None = None
        try:
            while (member := self._archive.next()) is not None:
                if member.isdir() or self._is_passed_over(member.name):
                    continue
                key = sample_of(member.name)
                if key != group.key:
                    yield from self._given(group)
                    group = _Group(key)
                if is_image(member.name) and self._is_taken(member.name):
                    content = self._content(member)
                    num_bytes = len(content) if isinstance(content, bytes) else 0
                    if group.images and group.held_bytes + num_bytes > HELD_BYTES:
                        yield from self._given(group)
                        group = _Group(key, sidecars=group.sidecars)
                    group.images.append((member.name, content))
                    group.held_bytes += num_bytes
                else:
                    self._read_beside(member, group)
                if member.type in PLAIN_TYPES:
                    self._links.note(member.name)
        except Broken as error:
            broken = error
        yield from self._given(group)
        yield from self._of_links()
        self._amend()
        if broken is not None:
            reason = self._archive.fault or f"the archive breaks off after {len(self._taken):,} images: it {broken}"
            yield Item(self._uri, None, Rejected("read", reason))

    def _is_passed_over(self, name: str) -> bool:
        leftover = leftover_of(name.split("/"))
        if leftover is not None:
            if is_image(name):
                self._notes.passed_over.note_leftover(leftover)
            return True
        if self._members.exclusion.covers(name.removeprefix("./")):
            self._notes.passed_over.excluded += 1
            return True
        return False

    def _is_taken(self, name: str) -> bool:
        extension = self._members.extension
        if extension is None:
            return True
        if name.lower().endswith(f".{extension}") and ("." in extension or not is_mask(name)):  # png is not seg.png
            return True
        self._notes.masks[_ending(name)] += 1
        return False

    def _read_beside(self, member: tarfile.TarInfo, group: _Group) -> None:
        """Read a wanted sidecar, and count other members that are not images."""
        if is_image(member.name):
            return
        if not group.sidecars.wants(member.name, self._wanted):
            ending = member.name.rpartition(".")[2].lower()
            if ending not in SIDECARS:
                self._notes.passed_over.note_file(member.name)
            return
        if member.islnk():
            self._links.wait(self._links.link(member), member.name)
        elif member.type not in PLAIN_TYPES:
            self._notes.sidecars["a link, or no plain file"] += 1
        elif member.size > MAX_SIDECAR_BYTES:
            self._notes.sidecars[f"more than {MAX_SIDECAR_BYTES >> 20} MiB"] += 1
        else:
            content = self._archive.content()
            if member.name.lower().endswith(".json") and not _is_json(content):
                self._notes.sidecars["a .json that is none"] += 1
            group.sidecars.put(member.name, content, self._wanted)

    def _content(self, member: tarfile.TarInfo) -> bytes | Rejected | Link:
        """The bytes of a member with the name of an image, or why there are none. Adds its name to `_taken`."""
        if member.name in self._taken:
            return Rejected("plan", "its name is in the archive already")
        self._taken.add(member.name)
        if member.islnk():
            return self._links.link(member)
        reason = unreadable_reason(member)
        if reason is not None:
            return Rejected("read", reason)
        self._spans[member.name] = self._archive.span
        try:
            return self._archive.content()
        except Broken as broken:
            return Rejected("read", f"the archive {broken} here")

    def _given(self, group: _Group) -> Iterator[Item]:
        """The images of a sample, described by the sidecars beside them or read before."""
        if not group.images:
            self._loose.update(group.sidecars)
            return
        shown = self._pictures(group)
        for name, content in group.images:
            span = self._spans.pop(name, None)
            if name not in shown:
                self._taken.discard(name)
                continue
            held = group.sidecars if self._hold(group.sidecars) else None
            self._given_images.append((name, held))
            item = self._described(name, group.sidecars)
            if isinstance(content, Link):
                self._links.wait(content, item)
            else:
                yield replace(item, content=content, span=span)
        if group.key in self._samples or group.sidecars.is_of_other_samples(shown):
            self._loose.update(group.sidecars)
        self._samples[group.key] = self._samples.get(group.key, False) or any(map(is_plain_picture, shown))

    def _pictures(self, group: _Group) -> set[str]:
        """The names of the images of a group that are taken; masks beside a picture are noted."""
        names = {name for name, _ in group.images}
        if self._members.extension is not None:
            return names
        has_picture = self._samples.get(group.key, False) or any(map(is_plain_picture, names))
        masks = {n for n in names if has_picture and is_mask(n) and not group.sidecars.has_its_own(n)}
        shown = names - masks
        self._notes.masks.update(map(_ending, masks))
        endings = {_ending(name) for name in shown}
        if (has_picture and len(endings) > 1) or (shown and group.key in self._samples and has_picture):
            self._notes.together.update(endings)
        self._notes.mask_like.update(ending for name in shown if (ending := mask_ending(name)) is not None)
        return shown

    def _hold(self, sidecars: Sidecars) -> bool:
        """Whether memory has room for sidecars until the archive ends, in case others come late."""
        self._held_bytes += sidecars.num_bytes
        return self._held_bytes <= HELD_BYTES

    def _of_links(self) -> Iterator[Item]:
        """The images that are hard links, from a second reading of the archive; linked sidecars go to `_loose`."""
        for place, content, span in self._links.contents():
            if isinstance(place, Item):
                yield replace(place, content=content, span=span)
            elif isinstance(content, bytes) and len(content) <= MAX_SIDECAR_BYTES:
                self._loose.put(place, content, self._wanted)

    def _amend(self) -> None:
        """Describe again the images with a sidecar that came later or lay elsewhere."""
        for name, held in self._given_images:
            if held is not None and self._loose.extensions_of(name) - held.extensions_of(name):
                item = self._described(name, held)
                self._notes.late[item.uri] = item

    def _described(self, name: str, near: Sidecars) -> Item:
        """An image without its bytes: its uri, label and kept values. Sidecars beside it win over loose ones."""
        sidecars = _Both(near, self._loose)
        description = _description(sidecars, name)
        values = tuple(
            value_of(_column(column.name, description, sidecars, name)[0], column.kind) for column in self._members.kept
        )
        label, reason = self._label(name, description, sidecars)
        return Item(member_uri(self._uri, name), label, None, values, reason)

    def _label(self, name: str, description: Mapping[str, object], sidecars: _Both) -> tuple[str | None, str]:
        """The label of an image, or why it has none."""
        labels = self._members.labels
        if labels == "none":
            return None, "labels were not asked for"
        partition = self._partition
        if self._column is not None:
            text, reason = _column(self._column, description, sidecars, name)
            return (partition[1], reason) if text is None and partition is not None else (text, reason)
        content = sidecars.of(name, "cls")
        if content is not None:
            return _of_sidecar(content, "cls")
        for key in JSON_LABELS:
            if key in description:
                return text_of(description[key]), why_no_label(description[key], f"{key} in its .json")
        content = sidecars.of(name, "txt")
        if content is not None:
            return _of_sidecar(content, "txt")
        if partition is not None:
            return partition[1], f"its folder gives {partition[0]} no value"
        folders = [part for part in name.split("/")[:-1] if part not in ("", ".", "..")]
        if not folders:
            return None, "no sidecar that was understood lies beside it, and no folder holds it in the archive"
        return text_of(printable(folders[-1 if labels == "parent" else 0])), "its folder has no name"


def _ending(name: str) -> str:
    """What follows the sample's name in the name of a member: a dot and at most the last two parts."""
    return f".{'.'.join(name.rpartition('/')[2].lower().split('.')[1:][-2:])}"


def _is_json(content: bytes) -> bool:
    try:
        json.loads(text_of_bytes(content))
    except (ValueError, RecursionError):
        return False
    return True


def _column(name: str, description: Mapping[str, object], sidecars: _Both, image: str) -> tuple[str | None, str]:
    """A field of the `.json`, else the sidecar with that extension; and the reason if it is None."""
    if name in description:
        return text_of(description[name]), why_no_label(description[name], f"{name} in its .json")
    content = sidecars.of(image, name.lower())
    if content is not None:
        return _of_sidecar(content, name)
    return None, f"neither a .json beside it nor a file with the extension {name} names its label"


def _of_sidecar(content: bytes, extension: str) -> tuple[str | None, str]:
    text = text_of_bytes(content).strip()
    return text_of(text), why_no_label(text, f"its .{extension}")


def _description(sidecars: _Both, name: str) -> dict[str, object]:
    content = sidecars.of(name, "json")
    try:
        found = json.loads(text_of_bytes(content)) if content is not None else None
    except (ValueError, RecursionError):  # not JSON, or nested so deeply that the parser fails: it names no label
        return {}
    return found if isinstance(found, dict) else {}
