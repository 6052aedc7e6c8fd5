"""The limit on the parts of one add. It is told while a source is listed, because a listing may take hours.

A part is some thousand image files, or archives and row groups of tables with as many images.
"""

from collections.abc import Callable, Sequence

from pipeline.errors import SourceError
from pipeline.images.containers.container import Container
from pipeline.store.segments.container_parts import images_counted
from pipeline.store.tables import ids

FILES_BETWEEN = ids.MAX_PART_ROWS  # image files after which the parts are counted anew: no part has more


class PartLimit:
    """Counts the parts that a source will have at least. Raises SourceError once an id cannot hold their number."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._images = 0
        self._containers = 0
        self._images_inside = 0  # as they count for parts; of a large container those of one full part

    def count_image(self) -> None:
        """Count an image file."""
        self._images += 1
        if self._images % FILES_BETWEEN == 0:
            self._check()

    def count_containers(self, found: Sequence[Container]) -> None:
        """Count archives, or slices of tables."""
        self._containers += len(found)
        self._images_inside += sum(min(images_counted(one), ids.MAX_PART_ROWS) for one in found)
        self._check()

    def of_units(self) -> Callable[[Sequence[Container]], None]:
        """The function that counts containers once they are all known: it replaces the count of archives."""
        self._containers = self._images_inside = 0
        return self.count_containers

    def check_parts(self, container_parts: int) -> None:
        """Check the number of parts that the containers make: it may be twice what was counted as the least."""
        self._check(container_parts)

    def _check(self, container_parts: int | None = None) -> None:
        least = -(-self._images_inside // ids.MAX_PART_ROWS)
        if ids.num_parts(self._images, least if container_parts is None else container_parts) > ids.MAX_PARTS:
            raise SourceError(
                f"{self._source} has more than {ids.MAX_PARTS:,} parts ({self._images:,} image files and "
                f"{self._containers:,} archives or slices of tables so far), and an add has no more: add its folders "
                "one after the other"
            )
