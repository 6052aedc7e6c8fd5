"""Samples in an archive, as webdataset defines them: members whose paths are equal up to a dot of the base name."""

from collections.abc import Iterator

from pipeline.images.labels.label_rows import plain_name
from pipeline.images.names.suffixes import IMAGES

# Words after the sample's name, in an image that describes another image of the sample: KEY.seg.png beside KEY.jpg.
MASK_WORDS = frozenset(
    {
        *("seg", "segm", "segmentation", "semantic", "instance", "instances", "panoptic", "parsing", "mask", "masks"),
        *("matte", "alpha", "trimap", "depth", "disparity", "normal", "normals", "edge", "edges", "flow", "heatmap"),
        *("label", "labels", "annotation", "annotations", "gt", "groundtruth", "thumb", "thumbnail"),
    }
)


def sample_of(name: str) -> str:
    """Webdataset's key of a member: its path up to the first dot of the base name."""
    folder, slash, base = plain_name(name).rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def is_image(name: str) -> bool:
    """Whether a member has the name of an image."""
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f"{dot}{suffix}".lower() in IMAGES


def is_mask(name: str) -> bool:
    """Whether a member is named like a mask, a depth or the like of a picture of the same sample: KEY.seg.png."""
    words = name.rpartition("/")[2].lower().split(".")[1:-1]
    return any(word.rstrip("0123456789").strip("_-") in MASK_WORDS for word in words)


def is_plain_picture(name: str) -> bool:
    """Whether the name of a member is only that of its sample and an ending: KEY.jpg."""
    return name.rpartition("/")[2].count(".") == 1


def mask_ending(name: str) -> str | None:
    """The ending, such as "_mask.png", of an image that is named like a mask of another; None for others."""
    stem, _, suffix = name.rpartition("/")[2].lower().rpartition(".")
    at = max(stem.rfind("_"), stem.rfind("-"))
    word = stem[at + 1 :].rstrip("0123456789")
    return f"{stem[at]}{stem[at + 1 :]}.{suffix}" if at > 0 and word in MASK_WORDS else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The path of a member up to each dot of its base name, and the rest after the dot; the longest path first."""
    name = plain_name(name)
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    if len(parts) == 2:  # nearly all names have one dot
        yield name[: -len(parts[1]) - 1], parts[1].lower()
        return
    for at in range(len(parts) - 1, 0, -1):
        yield f"{folder}{slash}{'.'.join(parts[:at])}", ".".join(parts[at:]).lower()


class Sidecars:
    """Contents of sidecars by the path that they share with images and by extension; at most `most_bytes` in all."""

    def __init__(self, most_bytes: int | None = None) -> None:
        self._found: dict[str, dict[str, bytes]] = {}
        self._most_bytes = most_bytes
        self.num_bytes = 0

    def wants(self, name: str, wanted: set[str]) -> bool:
        """Whether a member is a sidecar with one of the extensions `wanted`."""
        return any(extension in wanted for _, extension in _splits(name))

    def put(self, name: str, content: bytes, wanted: set[str]) -> None:
        """Store a sidecar. The first one of a name counts."""
        for stem, extension in _splits(name):
            if extension in wanted:
                self._put(stem, extension, content)
                return

    def of(self, image: str, extension: str) -> bytes | None:
        """The content of an image's sidecar with an extension, of the one that shares most of its path; may be None."""
        return next((found[extension] for found in self._of(image) if extension in found), None)

    def extensions_of(self, image: str) -> set[str]:
        """The extensions of the image's sidecars."""
        return {extension for found in self._of(image) for extension in found}

    def has_its_own(self, image: str) -> bool:
        """Whether a sidecar shares all of an image's path up to its ending."""
        return next(iter(_splits(image)))[0] in self._found

    def _of(self, image: str) -> Iterator[dict[str, bytes]]:
        """The sidecars of an image by extension, the one that shares most of its path first."""
        if not self._found:
            return
        stems = [plain_name(image), *(stem for stem, _ in _splits(image))]
        yield from (self._found[stem] for stem in stems if stem in self._found)

    def any_of(self, image: str) -> bool:
        """Whether the image has any sidecar."""
        return next(self._of(image), None) is not None

    def is_of_other_samples(self, images: set[str]) -> bool:
        """Whether some sidecars share no path with any of the images."""
        stems = {stem for image in images for stem, _ in _splits(image)} | {plain_name(image) for image in images}
        return any(stem not in stems for stem in self._found)

    def update(self, others: "Sidecars") -> None:
        """Store the sidecars of others, as far as there is room."""
        for stem, found in others._found.items():
            for extension, content in found.items():
                self._put(stem, extension, content)

    def _put(self, stem: str, extension: str, content: bytes) -> None:
        self.num_bytes += len(content)
        if self._most_bytes is None or self.num_bytes <= self._most_bytes:
            self._found.setdefault(stem, {}).setdefault(extension, content)
