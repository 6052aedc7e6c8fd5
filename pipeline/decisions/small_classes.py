"""Classes that the others outvote: too few entries to win where their neighbours come from classes many times as large.

What counts as small was measured (docs/benchmarks.md, on CIFAR-100): at k = 50 a class a quarter as large as ten others
keeps 33 to 56% of its images by rank voting, where the others keep 80 to 86%, and less by plurality; `--balance auto`
brings it to 67 to 81%. At half their size it keeps 58 to 73%.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OUTVOTED_FROM = 4.0  # times its entries, as many as others have


@dataclass(frozen=True)
class SmallClass:
    """A class with so many `entries`, where half of all entries are in classes of `others` or more."""

    label: str
    entries: int
    others: int


def small_classes(counts: Mapping[str, int]) -> tuple[SmallClass, ...]:
    """The classes far smaller than those that most entries belong to, the smallest first; none where all are alike.

    `counts` are the live entries of each class. A class is compared with the size of the class that the middle entry is
    in, when entries are ordered by the sizes of their classes: whom it meets as neighbours.
    """
    sizes = sorted((count for count in counts.values() if count > 0), reverse=True)
    total, seen, others = sum(sizes), 0, 0
    for size in sizes:
        seen, others = seen + size, size
        if 2 * seen >= total:
            break
    found = [
        SmallClass(label, count, others)
        for label, count in counts.items()
        if count > 0 and OUTVOTED_FROM * count <= others
    ]
    return tuple(sorted(found, key=lambda small: (small.entries, small.label)))


def hint(found: Sequence[SmallClass]) -> str:
    """One sentence about them, which names the way out; empty where there are none."""
    if not found:
        return ""
    first = found[0]
    entries = f"{first.entries:,} {'entry' if first.entries == 1 else 'entries'}"
    others = f"far smaller than others ({first.others:,}), which outvote"
    if len(found) == 1:
        return f"{first.label} ({entries}) is a class {others} it: ask with `--balance auto`"
    more = f"{first.label} ({entries}) and {len(found) - 1:,} more"
    return f"{more} are classes {others} them: ask with `--balance auto`"
