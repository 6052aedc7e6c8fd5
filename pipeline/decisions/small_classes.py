"""Finds small classes that larger classes outvote: they have too few entries to win among neighbours of larger classes.

The limit was measured (docs/benchmarks.md, on CIFAR-100). At k = 50, rank voting decides 33 to 56% of the images of a
class correctly if the class is a quarter as large as ten others, and 80 to 86% of the images of the others. Plurality
decides fewer correctly. `--balance auto` raises the small class to 67 to 81%. A class of half the size has 58 to 73%.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OUTVOTED_FROM = 4.0  # a class is small if others have this many times its entries


@dataclass(frozen=True)
class SmallClass:
    """A small class. It has `entries` entries; half of all entries are in classes with `others` entries or more."""

    label: str
    entries: int
    others: int


def small_classes(counts: Mapping[str, int]) -> tuple[SmallClass, ...]:
    """The classes that are far smaller than the classes of most entries, smallest first; empty if sizes are similar.

    `counts` has the number of live entries of each class. Each class is compared with the class of the median entry,
    where entries are ordered by the size of their class: typical neighbours come from classes of that size.
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
    """One sentence that names the small classes and the remedy; empty if there are none."""
    if not found:
        return ""
    first = found[0]
    entries = f"{first.entries:,} {'entry' if first.entries == 1 else 'entries'}"
    others = f"far smaller than others ({first.others:,}), which outvote"
    if len(found) == 1:
        return f"{first.label} ({entries}) is a class {others} it: ask with `--balance auto`"
    more = f"{first.label} ({entries}) and {len(found) - 1:,} more"
    return f"{more} are classes {others} them: ask with `--balance auto`"
