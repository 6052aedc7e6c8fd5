"""The labels of a source: how many images have which, why others have none, and which labels look like mistakes.

This module uses NumPy and Arrow only, and reads no file of the source.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images.labels.labels import EMPTY_ROW, NO_FOLDER, NO_ROW, Labels
from pipeline.images.labels.samples import mask_ending
from pipeline.images.names.uris import path_of_uri

SHOWN_LABELS = 20
_NO_LABELS = frozenset(
    {"null", "none", "nan", "n/a", "na", "<na>", "-1", "nil", "undefined", "unlabeled", "unlabelled"}
)

# Names that people give to parts of a data set, and to folders that hold all kinds of images; a year or a number may
# follow (train2017). They are seldom classes.
_NO_CLASS = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|eval|trainval|holdout|split)([-_ ]?set)?[-_ ]?\d*"
    r"|(images?|imgs?|jpe?gs?|jpegimages|pngs?|photos?|pictures?|pics|data|dataset|raw|input|all|files|samples|query"
    r"|gallery|downloads?|desktop|documents|tmp|temp|new folder|untitled folder|camera|dcim|unlabell?ed)[-_ ]?\d*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LabelCensus:
    """The labels of some images.

    `counts` has the images by label, `unlabelled` the images without a label by the reason. `unread` is the number of
    containers whose labels are known only when they are read. A label file has `num_rows` rows; `num_unmatched` of them
    name no image so far, and `unmatched` has the first of these.
    """

    counts: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    num_rows: int = 0
    num_unmatched: int = 0
    unmatched: tuple[str, ...] = ()

    @property
    def labelled(self) -> int:
        return sum(self.counts.values())

    @property
    def without(self) -> int:
        return sum(self.unlabelled.values())

    def __add__(self, other: "LabelCensus") -> "LabelCensus":
        """The census of the images of both, with the numbers of the first about the label file."""
        return LabelCensus(
            self.counts + other.counts,
            self.unlabelled + other.unlabelled,
            self.unread + other.unread,
            self.num_rows,
            self.num_unmatched,
            self.unmatched,
        )

    def questionable(self) -> list[str]:
        """The labels that are named like a split or a folder of images rather than a class, the most frequent first."""
        return [label for label, _ in self.counts.most_common() if _NO_CLASS.fullmatch(label.strip())]

    def doubtful(self) -> list[str]:
        """Labels that other programs write for a missing label, and labels with bytes that were not UTF-8."""
        return [label for label in self.counts if label.strip().lower() in _NO_LABELS or "\ufffd" in label]

    def alike(self) -> list[list[str]]:
        """Labels that differ only in case, spaces or Unicode form, and may be meant as one."""
        groups: dict[str, list[str]] = {}
        for label in self.counts:
            plain = unicodedata.normalize("NFKC", label).casefold()
            groups.setdefault(" ".join(re.split(r"[\s_-]+", plain.strip())), []).append(label)
        return [sorted(group) for group in groups.values() if len(group) > 1]

    def first_labels(self, number: int = SHOWN_LABELS) -> dict[str, int]:
        """The most frequent labels with their counts; labels of equal counts are ordered by name."""
        return dict(sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))[:number])

    def to_json(self) -> dict:
        """The census as a JSON object."""
        return {
            "labelled": self.labelled,
            "unlabelled": self.without,
            "why_unlabelled": dict(self.unlabelled.most_common()),
            "label_counts": self.first_labels(),
            "num_labels": len(self.counts),
            "questionable_labels": self.questionable()[:SHOWN_LABELS],
            "doubtful_labels": self.doubtful()[:SHOWN_LABELS],
            "alike_labels": self.alike()[:SHOWN_LABELS],
            "unread_containers": self.unread,
            "label_rows": self.num_rows,
            "label_rows_unmatched": self.num_unmatched,
            "first_unmatched": list(self.unmatched),
        }


def mask_endings(uris: pa.ChunkedArray) -> Counter[str]:
    """The number of image files that are named like masks of others, by the ending of their names."""
    found: Counter[str] = Counter()
    for batch in uris.chunks:
        suspicious = pc.match_substring_regex(batch, r"[_-][A-Za-z]+\d*\.[A-Za-z]+$")
        endings = (mask_ending(path_of_uri(uri)) for uri in batch.filter(suspicious).to_pylist())
        found.update(ending for ending in endings if ending is not None)
    return found


def census_of_files(
    column: pa.ChunkedArray, labels: Labels, rows_M: np.ndarray | None, said: str = NO_FOLDER
) -> LabelCensus:
    """The census of image files with these labels; `rows_M` has each image's row in the label file (-1: none).

    `said` is the reason of the source why an image has no label.
    """
    counts: Counter[str] = Counter()
    for pair in pc.value_counts(column).to_pylist():
        if pair["values"] is not None:
            counts[pair["values"]] += pair["counts"]
    without = column.null_count
    file = labels.read_file()
    if file is None or rows_M is None:
        reason = labels.why_none("", said)
        return LabelCensus(counts, Counter({reason: without} if without else {}))
    unnamed = int((rows_M < 0).sum())
    unlabelled = {NO_ROW: unnamed, EMPTY_ROW: without - unnamed}
    is_matched_N = np.zeros(len(file.rows), bool)
    is_matched_N[rows_M[rows_M >= 0]] = True
    num_names = len(file.rows)
    for row, _ in file.rows.repeated():  # a name counts once
        is_matched_N[row] = True
        num_names -= 1
    unmatched_N = np.flatnonzero(~is_matched_N)
    first = tuple(file.name_in(row) for row in unmatched_N[:3].tolist())
    return LabelCensus(counts, +Counter(unlabelled), 0, num_names, len(unmatched_N), first)
