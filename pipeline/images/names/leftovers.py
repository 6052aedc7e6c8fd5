"""Files of a source that are passed over: leftovers of desktops and storage devices, hidden files, excluded files.

They are counted, so that an add can report them.
"""

import bisect
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pathspec

from pipeline.errors import UsageError
from pipeline.images.names.suffixes import kind_of
from pipeline.images.names.uris import printable

# Folders that no user made: thumbnails, bins and snapshots of Synology and QNAP, bins and caches of Windows and macOS,
# and folders of fsck. The comparison ignores case. Names with a leading dot are hidden anyway.
LEFTOVER_FOLDERS = frozenset(
    {
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "__macosx",
        "$recycle.bin",
        "recycler",
        "recycled",
        "system volume information",
        "network trash folder",
        "temporary items",
        "found.000",
        "lost+found",
    }
)
_BEGINNINGS = frozenset(".") | {c for name in LEFTOVER_FOLDERS for c in (name[0], name[0].upper())}
NAMES_SHOWN = 20
MAX_ENDING = 12  # characters: a longer one is no ending


def leftover_of(steps: Sequence[str]) -> str | None:
    """The first folder or file name of a path that is a leftover or hidden; None if there is none."""
    for step in steps:
        if step[:1] in _BEGINNINGS and _is_leftover(step):
            return step
    return None


def _is_leftover(name: str) -> bool:
    return name.lower() in LEFTOVER_FOLDERS or (name.startswith(".") and name not in (".", ".."))


@dataclass(frozen=True)
class Exclusion:
    """The patterns of `--exclude`, in the syntax of .gitignore, compared with paths relative to the source.

    "masks" is a file or folder of that name at any depth, "*.png" any such file, "/masks" or "a/masks" a path relative
    to the source, "**" any folders. "#" and "!" have no special meaning. Raises UsageError for an invalid pattern.
    """

    patterns: tuple[str, ...] = ()
    _spec: pathspec.PathSpec = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lines = []
        for pattern in self.patterns:
            if not pattern.strip("/ "):
                raise UsageError("exclude has an empty pattern: give one such as '*_mask.png' or 'thumbs'")
            lines.append(f"\\{pattern}" if pattern.startswith(("#", "!")) else pattern)
        try:
            spec = pathspec.PathSpec.from_lines("gitignore", lines)
        except ValueError as error:
            raise UsageError(f"exclude has a pattern that cannot be understood ({error}): mend it") from error
        object.__setattr__(self, "_spec", spec)

    def __reduce__(self) -> tuple:
        return Exclusion, (self.patterns,)

    def covers(self, path: str) -> bool:
        """Whether a path relative to the source is excluded. The path of a folder must end in "/"."""
        return bool(self.patterns) and bool(self._spec.match_file(path.lstrip("/")))


def ending_of(name: str) -> str:
    """The ending of a file name, such as ".avif", in lower case; empty for a name without one."""
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    usable = dot and 0 < len(ending) <= MAX_ENDING and ending.isalnum()
    return f".{ending.lower()}" if usable else ""


@dataclass
class PassedOver:
    """What a listing or a reader passed over, counted as it proceeds.

    `endings` counts files by their ending, `leftovers` folders and hidden names by name, `excluded` files and folders
    that a pattern covers. `unreadable` has the folders that could not be listed, each with the reason. `label_files`
    has tables and JSON files that may contain labels.
    """

    endings: Counter[str] = field(default_factory=Counter)
    leftovers: Counter[str] = field(default_factory=Counter)
    excluded: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    label_files: list[str] = field(default_factory=list)

    @property
    def num_files(self) -> int:
        """Files that are neither images nor containers."""
        return sum(self.endings.values())

    def note_file(self, name: str, uri: str = "") -> None:
        """Count a file that gives no images."""
        self.endings[ending_of(name)] += 1
        looks_like_labels = name.lower().endswith((".csv", ".tsv", ".jsonl", ".json"))
        if uri and looks_like_labels:  # the first by name, in whatever order they come
            bisect.insort(self.label_files, uri)
            del self.label_files[NAMES_SHOWN:]

    def note_leftover(self, name: str) -> None:
        """Count a leftover folder or a hidden file. A file is counted without its name."""
        is_file = kind_of(name) is not None
        self.leftovers["._*" if name.startswith("._") else "hidden" if is_file else printable(name)] += 1

    def note_unreadable(self, uri: str, error: OSError) -> None:
        """Note a folder that could not be listed."""
        self.unreadable[uri] = error.strerror or os.strerror(error.errno or 0)

    def to_json(self) -> dict:
        """The counts as a JSON object."""
        return {
            "endings": first_counts(self.endings),
            "leftovers": first_counts(self.leftovers),
            "excluded": self.excluded,
            "unreadable": [
                {"uri": uri, "reason": reason} for uri, reason in list(self.unreadable.items())[:NAMES_SHOWN]
            ],
            "unreadable_folders": len(self.unreadable),
        }


def first_counts(counts: Counter[str]) -> dict[str, int]:
    """The largest counts; equal counts are ordered by name."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:NAMES_SHOWN])
