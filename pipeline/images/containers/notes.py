"""Notes that the reader of a container takes: what it passed over, and labels that came late."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pipeline.images.containers.items import Item
from pipeline.images.names.leftovers import PassedOver, first_counts


@dataclass
class ContainerNotes:
    """Notes that are filled while a container is read, and complete when it ends.

    `masks` counts images passed over because another image of their sample is the picture. `together` counts images
    that share a sample. `mask_like` counts images that are taken although they are named like masks of others. All
    three count by the ending of the names. `sidecars` counts sidecars that could not be read, by the reason. `late` has
    the descriptions, by uri, of images whose sidecars came after the image was given.
    """

    passed_over: PassedOver = field(default_factory=PassedOver)
    masks: Counter[str] = field(default_factory=Counter)
    together: Counter[str] = field(default_factory=Counter)
    sidecars: Counter[str] = field(default_factory=Counter)
    mask_like: Counter[str] = field(default_factory=Counter)
    late: dict[str, Item] = field(default_factory=dict)

    def add(self, other: "ContainerNotes") -> None:
        """Add the notes about another container. The files of a folder are no part of them."""
        for mine, theirs in (
            (self.passed_over.endings, other.passed_over.endings),
            (self.passed_over.leftovers, other.passed_over.leftovers),
            (self.masks, other.masks),
            (self.together, other.together),
            (self.sidecars, other.sidecars),
            (self.mask_like, other.mask_like),
        ):
            mine.update(theirs)
        self.passed_over.excluded += other.passed_over.excluded
        self.late |= other.late

    def amended(self, items: Iterable[Item]) -> list[Item]:
        """Items with the labels and kept values that came late."""
        if not self.late:
            return list(items)
        found = ((item, self.late.get(item.uri)) for item in items)
        return [item if late is None else replace(late, content=item.content, span=item.span) for item, late in found]

    def to_json(self) -> dict[str, dict[str, int]]:
        """The counts of samples with several images, as a JSON object."""
        return {
            "masks": first_counts(self.masks),
            "several_images": first_counts(self.together),
            "mask_like": first_counts(self.mask_like),
            "unread_sidecars": first_counts(self.sidecars),
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """All counts by name, in a form that can be added up."""
        noted = {
            "endings": self.passed_over.endings,
            "leftovers": self.passed_over.leftovers,
            "masks": self.masks,
            "together": self.together,
            "sidecars": self.sidecars,
            "mask_like": self.mask_like,
            "excluded": Counter({"": self.passed_over.excluded} if self.passed_over.excluded else {}),
        }
        return {name: dict(counts.most_common(COUNTED_NAMES)) for name, counts in noted.items() if counts}


COUNTED_NAMES = 50  # of each kind in a completion mark, so that it stays small
