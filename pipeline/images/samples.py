"""Samples in an archive, as webdataset has them: members whose paths are equal up to a dot of the base name."""

from collections.abc import Iterator, Sequence

from pipeline.images.suffixes import IMAGES

# What follows a sample's name in an image that describes another image of the sample: KEY.jpg beside KEY.seg.png.
MASK_WORDS = frozenset(
    {
        *("seg", "segm", "segmentation", "semantic", "instance", "instances", "panoptic", "parsing", "mask", "masks"),
        *("matte", "alpha", "trimap", "depth", "disparity", "normal", "normals", "edge", "edges", "flow", "heatmap"),
        *("label", "labels", "annotation", "annotations", "gt", "groundtruth", "thumb", "thumbnail"),
    }
)


def sample_of(name: str) -> str:
    """Webdataset's key of a member: its path up to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def is_image(name: str) -> bool:
    """Whether a member has the name of an image."""
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f"{dot}{suffix}".lower() in IMAGES


def pictures(names: Sequence[str]) -> set[str]:
    """Those of the images of one sample that are pictures: masks, depths and the like beside a picture are none."""
    masks = {name for name in names if _is_mask(name)}
    return set(names) - masks or set(names)


def _is_mask(name: str) -> bool:
    words = name.rpartition("/")[2].lower().split(".")[1:-1]
    return any(word.rstrip("0123456789").strip("_-") in MASK_WORDS for word in words)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The path of a member up to each dot of its base name and what follows that, the longest path first."""
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    if len(parts) == 2:  # nearly all are like that
        yield name[: -len(parts[1]) - 1], parts[1].lower()
        return
    for at in range(len(parts) - 1, 0, -1):
        yield f"{folder}{slash}{'.'.join(parts[:at])}", ".".join(parts[at:]).lower()


class Sidecars:
    """Contents of sidecars by the path they share with images and by extension, at most `most_bytes` of them."""

    def __init__(self, most_bytes: int | None = None) -> None:
        self._found: dict[str, dict[str, bytes]] = {}
        self._most_bytes = most_bytes
        self._num_bytes = 0

    def wants(self, name: str, wanted: set[str]) -> bool:
        """Whether a member is a sidecar with one of the extensions `wanted`."""
        return any(extension in wanted for _, extension in _splits(name))

    def put(self, name: str, content: bytes, wanted: set[str]) -> None:
        """Keep a sidecar; the first of a name counts."""
        for stem, extension in _splits(name):
            if extension in wanted:
                self._put(stem, extension, content)
                return

    def of(self, image: str, extension: str) -> bytes | None:
        """The sidecar of an image with an extension, the one that shares most of its path."""
        return next(
            (found[extension] for stem, _ in _splits(image) if extension in (found := self._found.get(stem, {}))), None
        )

    def any_of(self, image: str) -> bool:
        """Whether any sidecar is the image's."""
        return any(stem in self._found for stem, _ in _splits(image))

    def is_of_other_samples(self, images: set[str]) -> bool:
        """Whether some sidecars share no path with any of the images."""
        stems = {stem for image in images for stem, _ in _splits(image)}
        return any(stem not in stems for stem in self._found)

    def update(self, others: "Sidecars") -> None:
        """Keep what others have, as far as there is room."""
        for stem, found in others._found.items():
            for extension, content in found.items():
                self._put(stem, extension, content)

    def _put(self, stem: str, extension: str, content: bytes) -> None:
        self._num_bytes += len(content)
        if self._most_bytes is None or self._num_bytes <= self._most_bytes:
            self._found.setdefault(stem, {}).setdefault(extension, content)
