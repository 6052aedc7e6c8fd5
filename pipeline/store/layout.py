"""The layout of a memory: all paths are made and parsed here. docs/formats.md shows the tree of files.

Paths are relative to the memory and use "/". Folders of segments, job outputs and shards have a closing slash, so that
a name can be appended and they can be compared as prefixes.
"""

import datetime
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
COUNTS_FOLDER = "counts"
LEASES = "leases"
ERASURES = "erasures"

# The top folders of a memory. Anything else in its folder belongs to somebody else, and is left alone.
FOLDERS = frozenset(
    {VERSIONS, ENCODER, SEGMENTS, PACKS, INDEX, TOMBSTONES_FOLDER, LABELS_FOLDER, COUNTS_FOLDER, LEASES, ERASURES}
)
# The folders of the files that a version may name. This release never writes a version that names any other place.
NAMED = frozenset({ENCODER, SEGMENTS, PACKS, INDEX, TOMBSTONES_FOLDER, LABELS_FOLDER, COUNTS_FOLDER})

PACK_MARKS = f"{PACKS}/done/"  # the completion marks of a compaction under way

HINT = f"{VERSIONS}/latest"
ROLLUP = f"{VERSIONS}/rollup"
UNFINISHED_COPY = "copying.json"  # marks an unfinished copy, which is not a memory yet
UNFINISHED_EXPORT = "exporting.json"  # marks an unfinished export, which is no source yet
ASIDE = ".aside"  # the suffix of files that are being written

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
FAISS_FILE, SAMPLE_FILE, QUESTIONS_FILE = "index.faiss", "sample.f16", "questions.f16"
BUILD_BEGUN = "begun.json"

_HELD, _MAP = ".held.npy", ".map.parquet"

Kind = Literal[
    "entries",
    "plan",
    "rejected",
    "thumbnails",
    "offsets",
    "digests",
    "tombstones",
    "labels",
    "map",
    "counts",
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
    "digests": "digests",
}
_OF_A_SHARD: dict[str, Kind] = {
    IDS_FILE: "shard ids",
    LABELS_FILE: "shard labels",
    VECTORS_FILE: "shard vectors",
    ENTRIES_FILE: "shard entries",
}

# A file that identifies its surroundings, and the folders of tables beside it: of a memory, and of a job's output.
OURS = (
    (
        re.compile(rf"{VERSIONS}/\d{{20}}\.json$"),
        (SEGMENTS, PACKS, TOMBSTONES_FOLDER, LABELS_FOLDER, COUNTS_FOLDER, INDEX),
    ),
    (re.compile(rf"{LEASES}/[0-9a-f]+\.json$"), (LEASES,)),  # records of listings, also before the first version
    (re.compile(re.escape(JOB) + "$"), FOLDERS_OF_A_JOB),
)

# The files of vectors of an export, below its place.
EXPORTED = re.compile(r"(?:img_emb/img_emb_|entries_)[0-9]+\.(?:npy|parquet)")

_VERSION = re.compile(r"(?P<number>[0-9]{20})(?P<checkpoint>\.checkpoint)?\.json")
_SEGMENT = re.compile(r"segments/(?P<number>[0-9]{8})/(?P<inside>.*)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{8}")
_MARK = re.compile(r"(?P<part>[0-9]{6})\.json")
_GENERATION = re.compile(r"(?P<number>[0-9]{1,8})-")
_TOP = re.compile(r"index/[^/]+/")
_LISTED_AT = "%Y%m%dT%H%M%S.%fZ"
_LISTING = re.compile(r"(?P<time>[0-9]{8}T[0-9]{6}\.[0-9]{6}Z)-[0-9a-f]+-[0-9]{6,}\.parquet")


# Versions


def commit_path(number: int) -> str:
    """The commit of a version."""
    return f"{VERSIONS}/{number:020d}.json"


def checkpoint_path(number: int) -> str:
    """The checkpoint of a version (the whole state), which only some versions have."""
    return f"{VERSIONS}/{number:020d}.checkpoint.json"


def commit_number(name: str) -> int | None:
    """The version whose commit has this name or path; None if it is not a commit."""
    return _version_number(name, checkpoint=False)


def checkpoint_number(name: str) -> int | None:
    """The version whose checkpoint has this name or path; None if it is not a checkpoint."""
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
    """A path in a segment: the segment's number, and the path relative to the segment's folder."""

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
    """The segment whose folder has this name; None if it is not a segment's folder."""
    number = int(name) if _NUMBER.fullmatch(name) else 0
    return number if 0 < number <= MAX_SEGMENT else None


def in_segment(path: str) -> InSegment | None:
    """The parts of a path in a segment; None for any other path."""
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
    """The rows of one kind (entries, rejected, …) that one attempt at a part wrote."""
    return f"{folder}{kind}/{part:06d}-{attempt}.parquet"


def marks_folder(folder: str) -> str:
    """The folder of the completion marks of a segment or job, with its closing slash."""
    return f"{folder}{DONE}/"


def mark_path(folder: str, part: int) -> str:
    """The completion mark of a part."""
    return f"{marks_folder(folder)}{part:06d}.json"


def part_of_mark(name: str) -> int | None:
    """The part whose completion mark has this name or path; None if it is not a completion mark."""
    match = _MARK.fullmatch(name.rpartition("/")[2])
    return int(match["part"]) if match else None


def mark_of_rows(path: str) -> str:
    """The completion mark that names a file of rows."""
    folder, _, name = split_rows(path)
    return mark_path(folder, int(name.partition("-")[0]))


def split_rows(path: str) -> tuple[str, str, str]:
    """Split the path of a file of rows: the folder of its segment or job, its kind, and its name."""
    above, _, name = path.rpartition("/")
    folder, slash, kind = above.rpartition("/")
    return f"{folder}{slash}", kind, name


def folded_path(number: int, kind: str, version: int, nonce: str) -> str:
    """The rows of one kind of single adds that were folded at a version."""
    return f"{segment_folder(number)}{kind}/{version:020d}-{nonce}.parquet"


def packed_path(number: int | None, version: int, first_id: int, nonce: str) -> str:
    """Entries that `compact` merged: of one segment, or of several (None)."""
    folder = f"{segment_folder(number)}entries" if number is not None else PACKS
    return f"{folder}/{version:020d}-{first_id:019d}-{nonce}.parquet"


def pack_mark_path(key: str) -> str:
    """The completion mark of a step of `compact`."""
    return f"{PACK_MARKS}{key}.json"


def rewritten_path(path: str, nonce: str, number: int) -> str:
    """The file that an erasure writes in the place of a file of rows; `number` counts its rewritten files."""
    return f"{path.rpartition('/')[0]}/{nonce}-{number:06d}.parquet"


def digests_path(number: int, of: str, file: int, nonce: str) -> str:
    """A file of the digests of a segment's uris, or sha256s, and the ids that have them."""
    return f"{segment_folder(number)}digests/{of}-{file:06d}-{nonce}.parquet"


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


def listing_folder(fingerprint: str) -> str:
    """The record of a source's listing that is under way or was killed, with its closing slash; a lease holds it."""
    return f"{LEASES}/listing-{fingerprint[:16]}/"


def is_listing(path: str) -> bool:
    """Whether a file belongs to the record of a listing."""
    return path.startswith(f"{LEASES}/listing-")


def listing_path(folder: str, now: datetime.datetime, nonce: str, number: int) -> str:
    """A file of pages in the record of a listing, written `now` (UTC)."""
    return f"{folder}{now.strftime(_LISTED_AT)}-{nonce}-{number:06d}.parquet"


def time_of_listing(name: str) -> datetime.datetime | None:
    """When a file in the record of a listing was written; None for any other name."""
    match = _LISTING.fullmatch(name)
    try:
        return datetime.datetime.strptime(match["time"], _LISTED_AT).replace(tzinfo=datetime.UTC) if match else None
    except ValueError:  # such as a month 13
        return None


def erasure_path(nonce: str) -> str:
    """The plan of an erasure that is under way."""
    return f"{ERASURES}/{nonce}.json"


def nonce_of(path: str) -> str:
    """The nonce in the name of a lease or of the plan of an erasure."""
    return path.rpartition("/")[2].removesuffix(".json")


# The index


def generation_folder(number: int, nonce: str) -> str:
    """The folder of an index."""
    return f"{INDEX}/{number:06d}-{nonce}/"


def generation_number(name: str) -> int | None:
    """The generation whose folder has this name in the folder of indexes; None if it is not a generation's folder."""
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
    """The folder that an erasure writes in the place of a shard's folder; `path` is a file of the old shard."""
    return f"{folder_of(path).removesuffix('/')}-{nonce}/"


def folder_of(path: str) -> str:
    """The parent folder of a file, with its closing slash."""
    above, slash, _ = path.rpartition("/")
    return f"{above}{slash}"


def trained_path(generation: str) -> str:
    """The trained index without rows."""
    return f"{generation}trained.faiss"


def candidates_path(generation: str) -> str:
    """The table of measured index keys, with the chosen one."""
    return f"{generation}candidates.json"


def build_folder(fingerprint: str) -> str:
    """The folder of the marks of a running index build, with its closing slash."""
    return f"{INDEX}/begun-{fingerprint[:16]}/"


def is_build(name: str) -> bool:
    """Whether the folder of this name in the folder of indexes belongs to an unfinished build."""
    return name.startswith("begun-")


def step_path(build: str, step: str) -> str:
    """The mark of a step of a build."""
    return f"{build}{step}.json"


# Any path


def is_mark_of_job(path: str) -> bool:
    """Whether a file is a completion mark of an index build or of a compaction: these go on from marks alone."""
    top, _, rest = path.partition("/")
    return path.startswith(PACK_MARKS) or (top == INDEX and is_build(rest))


def folder_at_the_top(path: str) -> str:
    """The first folder of a path."""
    return path.partition("/")[0]


def kind_of(path: str) -> Kind:
    """The kind of a file by its path; "other" if it has none of these kinds."""
    top, name = folder_at_the_top(path), path.rpartition("/")[2]
    if top == PACKS:
        return "other" if path.startswith(PACK_MARKS) else "entries"
    if top == SEGMENTS:
        inside = in_segment(path)
        folder = folder_at_the_top(inside.inside) if inside else ""
        return "other" if name.endswith(_HELD) else _OF_A_SEGMENT.get(folder, "other")
    if top == LABELS_FOLDER:
        return "map" if path.endswith(_MAP) else "labels"
    if top == TOMBSTONES_FOLDER:
        return "tombstones"
    if top == COUNTS_FOLDER:
        return "counts"
    if top == INDEX:
        return _OF_A_SHARD.get(name, "other")
    return "other"


def way_out(path: str) -> str:
    """The advice for a damaged or missing file."""
    if folder_at_the_top(path) == INDEX:
        return "run `index --rebuild`, which makes the index anew from the entries"
    return "restore it from a copy of the memory"


def is_aside(path: str) -> bool:
    """Whether a file is being written, or was left unfinished when its writer died."""
    return path.endswith(ASIDE)
