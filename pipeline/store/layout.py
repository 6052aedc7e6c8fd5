"""Where everything of a memory lies: paths are made and parsed here. docs/formats.md draws it.

Paths are relative to the memory and use "/". A folder of a segment, of a job's output or of a shard is given with its
closing slash, so that it can stand before a name and be compared as a prefix.
"""

import re
from dataclasses import dataclass
from typing import Literal

from pipeline.store.values import MAX_SEGMENT, MAX_VERSION

VERSIONS = "versions"
ENCODER = "encoder"
SEGMENTS = "segments"
PACKS = "packs"
INDEX = "index"
TOMBSTONES_FOLDER = "tombstones"
LABELS_FOLDER = "labels"
LEASES = "leases"
ERASURES = "erasures"

# What a memory's folder holds. Anything else in it is somebody's, and left alone.
FOLDERS = frozenset({VERSIONS, ENCODER, SEGMENTS, PACKS, INDEX, TOMBSTONES_FOLDER, LABELS_FOLDER, LEASES, ERASURES})
# Where files lie that a version may name. What it says of any other place is not by this release.
NAMED = frozenset({ENCODER, SEGMENTS, PACKS, INDEX, TOMBSTONES_FOLDER, LABELS_FOLDER})

HINT = f"{VERSIONS}/latest"
UNFINISHED_COPY = "copying.json"  # lies in what is not a memory yet
ASIDE = ".aside"  # ends the name of what is being written

# The small files of a segment that no version names.
DESCRIPTION = "segment.json"
GIVEN_UP = "given_up.json"
NUMERICS = "numerics.json"
UNNAMED_OF_A_SEGMENT = (DESCRIPTION, GIVEN_UP, NUMERICS)
DONE = "done"  # the folder of completion marks

# The output of a bulk classification.
JOB = "job.json"
FOLDERS_OF_A_JOB = ("plan", "containers", "decisions", "rejected")
ROWS_OF_A_JOB = ("decisions", "rejected")

# The files of a shard.
IDS_FILE, LABELS_FILE, VECTORS_FILE, ENTRIES_FILE = "ids.npy", "labels.npy", "vectors.f16", "entries.arrow"
FAISS_FILE, SAMPLE_FILE = "index.faiss", "sample.f16"
BUILD_BEGUN = "begun.json"

_HELD, _MAP = ".held.npy", ".map.parquet"

Kind = Literal[
    "entries",
    "plan",
    "rejected",
    "thumbnails",
    "offsets",
    "tombstones",
    "labels",
    "map",
    "shard ids",
    "shard labels",
    "shard vectors",
    "shard entries",
    "other",
]
_OF_A_SEGMENT: dict[str, Kind] = {
    "entries": "entries",
    "plan": "plan",
    "rejected": "rejected",
    "thumbnails": "thumbnails",
    "offsets": "offsets",
}
_OF_A_SHARD: dict[str, Kind] = {
    IDS_FILE: "shard ids",
    LABELS_FILE: "shard labels",
    VECTORS_FILE: "shard vectors",
    ENTRIES_FILE: "shard entries",
}

# A file that tells what lies around it, and the folders of tables beside it: of a memory, and of a job's output.
OURS = (
    (re.compile(rf"{VERSIONS}/\d{{20}}\.json$"), (SEGMENTS, PACKS, TOMBSTONES_FOLDER, LABELS_FOLDER, INDEX)),
    (re.compile(re.escape(JOB) + "$"), FOLDERS_OF_A_JOB),
)

_VERSION = re.compile(r"(?P<number>[0-9]{20})(?P<checkpoint>\.checkpoint)?\.json")
_SEGMENT = re.compile(r"segments/(?P<number>[0-9]{8})/(?P<inside>.*)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{8}")
_MARK = re.compile(r"(?P<part>[0-9]{6})\.json")
_GENERATION = re.compile(r"(?P<number>[0-9]{1,8})-")
_TOP = re.compile(r"index/[^/]+/")


# Versions


def commit_path(number: int) -> str:
    """The commit of a version."""
    return f"{VERSIONS}/{number:020d}.json"


def checkpoint_path(number: int) -> str:
    """The whole state at a version, for those that have it."""
    return f"{VERSIONS}/{number:020d}.checkpoint.json"


def commit_number(name: str) -> int | None:
    """The version whose commit has this name or path; None where it is none's."""
    return _version_number(name, checkpoint=False)


def checkpoint_number(name: str) -> int | None:
    """The version whose checkpoint has this name or path; None where it is none's."""
    return _version_number(name, checkpoint=True)


def _version_number(name: str, *, checkpoint: bool) -> int | None:
    match = _VERSION.fullmatch(name.removeprefix(f"{VERSIONS}/"))
    if match is None or (match["checkpoint"] is not None) != checkpoint:
        return None
    number = int(match["number"])
    return number if 0 < number <= MAX_VERSION else None


# Segments


@dataclass(frozen=True)
class InSegment:
    """A path in a segment: the segment's number, and the path from the segment's folder on."""

    number: int
    inside: str

    @property
    def is_mark(self) -> bool:
        """Whether it is a completion mark."""
        return self.inside.startswith(f"{DONE}/")


def segment_folder(number: int) -> str:
    """The folder of a segment, with its closing slash."""
    return f"{SEGMENTS}/{number:08d}/"


def segment_number(name: str) -> int | None:
    """The segment whose folder has this name; None where it is none's."""
    number = int(name) if _NUMBER.fullmatch(name) else 0
    return number if 0 < number <= MAX_SEGMENT else None


def in_segment(path: str) -> InSegment | None:
    """What a path in a segment says; None for any other."""
    match = _SEGMENT.fullmatch(path)
    return InSegment(int(match["number"]), match["inside"]) if match else None


def plan_path(folder: str, nonce: str) -> str:
    """The frozen plan of a segment or job."""
    return f"{folder}plan/{nonce}.parquet"


def containers_path(folder: str, nonce: str) -> str:
    """The containers (archives, Parquet files) of a plan."""
    return f"{folder}containers/{nonce}.parquet"


def held_path(folder: str, nonce: str) -> str:
    """The digests that the memory held when an add was planned."""
    return f"{folder}plan/{nonce}{_HELD}"


def rows_path(folder: str, kind: str, part: int, attempt: str) -> str:
    """The rows of one kind (entries, rejected, …) that an attempt at a part made."""
    return f"{folder}{kind}/{part:06d}-{attempt}.parquet"


def marks_folder(folder: str) -> str:
    """The folder of the completion marks of a segment or job, with its closing slash."""
    return f"{folder}{DONE}/"


def mark_path(folder: str, part: int) -> str:
    """The completion mark of a part."""
    return f"{marks_folder(folder)}{part:06d}.json"


def part_of_mark(name: str) -> int | None:
    """The part whose completion mark has this name, or path; None where it is none's."""
    match = _MARK.fullmatch(name.rpartition("/")[2])
    return int(match["part"]) if match else None


def mark_of_rows(path: str) -> str:
    """The completion mark that names a file of rows."""
    folder, _, name = split_rows(path)
    return mark_path(folder, int(name.partition("-")[0]))


def split_rows(path: str) -> tuple[str, str, str]:
    """The folder of the segment or job of a file of rows, its kind, and its name."""
    above, _, name = path.rpartition("/")
    folder, slash, kind = above.rpartition("/")
    return f"{folder}{slash}", kind, name


def folded_path(number: int, kind: str, version: int, nonce: str) -> str:
    """The rows of one kind of single adds that were folded at a version."""
    return f"{segment_folder(number)}{kind}/{version:020d}-{nonce}.parquet"


def packed_path(number: int | None, version: int, first_id: int, nonce: str) -> str:
    """Entries that `compact` joined: of one segment, or (None) of several."""
    folder = f"{segment_folder(number)}entries" if number is not None else PACKS
    return f"{folder}/{version:020d}-{first_id:019d}-{nonce}.parquet"


def rewritten_path(path: str, nonce: str, number: int) -> str:
    """What an erasure writes in the place of a file of rows, the `number`-th that it rewrites."""
    return f"{path.rpartition('/')[0]}/{nonce}-{number:06d}.parquet"


# Overlays, the encoder, leases and erasures


def overlay_path(folder: str, version: int, nonce: str) -> str:
    """Tombstones, or corrected labels, written at a version."""
    return f"{folder}/{version:020d}-{nonce}.parquet"


def map_path(version: int, nonce: str) -> str:
    """The map of a label set written at a version."""
    return f"{LABELS_FOLDER}/{version:020d}-{nonce}{_MAP}"


def weights_path(sha256: str) -> str:
    """The weights of the encoder."""
    return f"{ENCODER}/{sha256}.safetensors"


def lease_path(nonce: str) -> str:
    """The lease of a process at work."""
    return f"{LEASES}/{nonce}.json"


def erasure_path(nonce: str) -> str:
    """The plan of an erasure that is under way."""
    return f"{ERASURES}/{nonce}.json"


def nonce_of(path: str) -> str:
    """The nonce by which a lease or the plan of an erasure is named."""
    return path.rpartition("/")[2].removesuffix(".json")


# The index


def generation_folder(number: int, nonce: str) -> str:
    """The folder of an index."""
    return f"{INDEX}/{number:06d}-{nonce}/"


def generation_number(name: str) -> int | None:
    """The generation whose folder has this name in the folder of indexes; None where it is none's."""
    match = _GENERATION.match(name)
    return int(match["number"]) if match else None


def generation_of(path: str) -> str:
    """The folder of the index that a file belongs to, with its closing slash. Raises ValueError."""
    match = _TOP.match(path)
    if match is None:
        raise ValueError(f"{path} belongs to no index")
    return match[0]


def shard_folder(generation: str, number: int) -> str:
    """The folder of a shard."""
    return f"{generation}shards/{number}/"


def rewritten_shard_folder(path: str, nonce: str) -> str:
    """The folder of what an erasure writes in the place of the shard that a file belongs to."""
    return f"{folder_of(path).removesuffix('/')}-{nonce}/"


def folder_of(path: str) -> str:
    """The folder that a file lies in, with its closing slash."""
    above, slash, _ = path.rpartition("/")
    return f"{above}{slash}"


def trained_path(generation: str) -> str:
    """The trained index without rows."""
    return f"{generation}trained.faiss"


def candidates_path(generation: str) -> str:
    """The keys that were measured, and which was chosen."""
    return f"{generation}candidates.json"


def build_folder(fingerprint: str) -> str:
    """The marks of a build that is under way."""
    return f"{INDEX}/begun-{fingerprint[:16]}/"


def is_build(name: str) -> bool:
    """Whether the folder of this name in the folder of indexes is that of a build under way."""
    return name.startswith("begun-")


def step_path(build: str, step: str) -> str:
    """The mark of a step of a build."""
    return f"{build}{step}.json"


# Any path


def folder_at_the_top(path: str) -> str:
    """The first folder of a path."""
    return path.partition("/")[0]


def kind_of(path: str) -> Kind:
    """What a file holds, by where it lies; "other" where nothing here says."""
    top, name = folder_at_the_top(path), path.rpartition("/")[2]
    if top == PACKS:
        return "entries"
    if top == SEGMENTS:
        inside = in_segment(path)
        folder = folder_at_the_top(inside.inside) if inside else ""
        return "other" if name.endswith(_HELD) else _OF_A_SEGMENT.get(folder, "other")
    if top == LABELS_FOLDER:
        return "map" if path.endswith(_MAP) else "labels"
    if top == TOMBSTONES_FOLDER:
        return "tombstones"
    if top == INDEX:
        return _OF_A_SHARD.get(name, "other")
    return "other"


def way_out(path: str) -> str:
    """What to do about a damaged or missing file."""
    if folder_at_the_top(path) == INDEX:
        return "run `index --rebuild`, which makes the index anew from the entries"
    return "restore it from a copy of the memory"


def is_aside(path: str) -> bool:
    """Whether a file is one that is being written, or was when its writer died."""
    return path.endswith(ASIDE)
