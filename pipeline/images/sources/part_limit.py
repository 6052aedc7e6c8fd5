"""The limit on the parts of one add. It is told while a source is listed, because a listing may take hours.

A part is some thousand image files, one archive, or some row groups of a table.
"""

from collections.abc import Callable

from pipeline.errors import SourceError
from pipeline.store.tables import ids

FILES_BETWEEN = ids.MAX_PART_ROWS  # image files after which the parts are counted anew: no part has more


class PartLimit:
    """Counts the parts that a source will have at least. Raises SourceError once an id cannot hold their number."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._images = 0
        self._containers = 0

    def count_image(self) -> None:
        """Count an image file."""
        self._images += 1
        if self._images % FILES_BETWEEN == 0:
            self._check(self._containers)

    def count_containers(self, number: int) -> None:
        """Count archives that are a part each."""
        self._containers += number
        self._check(self._containers)

    def of_units(self) -> Callable[[int], None]:
        """A check of the number of containers once they are all known: it replaces the count of archives."""
        return self._check

    def _check(self, containers: int) -> None:
        if ids.num_parts(self._images, containers) > ids.MAX_PARTS:
            raise SourceError(
                f"{self._source} has more than {ids.MAX_PARTS:,} parts ({self._images:,} image files and "
                f"{containers:,} archives or slices of tables so far), and an add has no more: add its folders one "
                "after the other, or pack small archives into larger ones"
            )
