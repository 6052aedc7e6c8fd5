"""The labels of all groups, numbered once: from version to version only what is new is sent and numbered.

A group's labels are named by the digest of their names. An ingress that has the names of a digest is sent the digest
and the counts alone. Shapes: C labels.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.decisions.neighbor_table import LabelStatistics
from pipeline.recent import Recent

TRANSLATIONS_BYTES = 64 << 20  # of codes of recent lists of labels
MANY_LABELS = 10_000  # from this number on, labels are merged outside the event loop; so many take about 5 ms
MOST_LABELS = 4_000_000  # of all versions and label sets so far: about 400 MB


def digest_of(labels: Sequence[str]) -> str:
    """A digest of the names of some labels in their order."""
    found = hashlib.blake2b(digest_size=16)
    for start in range(0, len(labels), 4_096):
        found.update("".join(f"{len(label)} {label}" for label in labels[start : start + 4_096]).encode())
    return found.hexdigest()


@dataclass(frozen=True)
class Ordered:
    """The labels that entries of a group have, ordered by name: their codes in the group, names and digest.

    `used` are the codes in their own order (int64 [C]), by which a later version sees that nothing has changed.
    """

    used: np.ndarray
    codes: np.ndarray
    labels: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, names: Sequence[str], used: np.ndarray, before: "Ordered | None" = None) -> "Ordered":
        """Order the labels with these codes (int64 [C] ascending). If they are those of `before`, nothing is sorted."""
        if before is not None and np.array_equal(used, before.used) and before.named_by(names):
            return before
        codes = np.array(sorted(used.tolist(), key=names.__getitem__), np.int64)
        labels = tuple(names[code] for code in codes.tolist())
        return cls(used, codes, labels, digest_of(labels))

    def named_by(self, names: Sequence[str]) -> bool:
        """Whether the codes have these names still. The map of a label set may have changed."""
        return all(names[code] == label for code, label in zip(self.codes.tolist(), self.labels, strict=True))


class Vocabulary:
    """Numbers the labels of all groups in the order in which they come. A number stays. Any thread may use it."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._names: tuple[str, ...] = ()
        self._translations = Recent[np.ndarray](TRANSLATIONS_BYTES)
        self._lock = threading.Lock()

    @property
    def is_large(self) -> bool:
        """Whether to use it outside the event loop: it has many labels, or another thread is adding many."""
        return self._lock.locked() or len(self._codes) > MANY_LABELS

    @property
    def is_full(self) -> bool:
        """Whether it has so many labels that a new one should be begun."""
        return len(self._codes) > MOST_LABELS

    def merge(self, parts: Sequence[LabelStatistics]) -> tuple[LabelStatistics, list[np.ndarray]]:
        """The merged statistics, and for each part the numbers of its labels, int32 [C + 1] with -1 at the end.

        Names are looked up only for lists of labels that are new. Labels that no entry has any more are counted as 0.
        """
        with self._lock:
            translations = [self._translation(part) for part in parts]
            if len(self._names) < len(self._codes):
                self._names = tuple(self._codes)
            counts_C = np.zeros(len(self._names), np.int64)
            for part, translation in zip(parts, translations, strict=True):
                counts_C[translation[:-1]] += part.counts_C  # each label is in a part once
            live, whole = sum(part.live for part in parts), sum(part.whole for part in parts)
            return LabelStatistics(self._names, counts_C, live, whole), translations

    def _translation(self, part: LabelStatistics) -> np.ndarray:
        known = self._translations.get(part.vocabulary) if part.vocabulary else None
        if known is not None:
            return known
        codes = self._codes
        found = np.array([*(codes.setdefault(label, len(codes)) for label in part.labels), -1], np.int32)
        if part.vocabulary:
            self._translations.put(part.vocabulary, found, found.nbytes)
        return found
