"""Goes on with the frozen plan of an unfinished add, without listing its source again.

Listing a billion objects takes days, and the plan is the list. So the same command takes the plan as it is: files that
came later are not in it, and files that are gone are rejected when their part is done. `refresh` lists again.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images.containers.container import ImageChoice
from pipeline.images.labels.census import LabelCensus, census_of_files
from pipeline.images.labels.labels import Labels
from pipeline.images.names.leftovers import Exclusion, PassedOver
from pipeline.images.names.uris import printable
from pipeline.images.sources.gathering import IMAGES
from pipeline.images.sources.listing import Listing
from pipeline.images.sources.walk import walk_source
from pipeline.store.segments.reservations import Reservation, unfinished
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.parquet_columns import read_row_groups
from pipeline.store.tables.schemas import CONTAINERS, read_table

COUNTED_PARTS = 256  # parts of a plan whose labels are counted: 4 million images, a second on a disk


@dataclass(frozen=True)
class Asked:
    """What an add is asked to do, apart from the identity of its vectors. `dataset` None is the name of the source."""

    labels: Labels
    choice: ImageChoice
    dataset: str | None
    thumbnails: bool
    keep: tuple[str, ...]
    duplicates: str

    def fingerprint(self, uri: str, name: str, identity: Identity) -> str:
        """The hash of source, options and identity by which the same command finds its segment."""
        about: dict[str, Any] = {
            "source": uri,
            "labels": self.labels.option,
            "dataset": self.dataset_of(name),
            "thumbnails": self.thumbnails,
        }
        about |= {"labels_sha256": self.labels.sha256} if self.labels.file else {}
        about |= {"keep": sorted(self.keep)} if self.keep else {}
        about |= {"exclude": sorted(self.choice.exclude)} if self.choice.exclude else {}
        about |= {"image_extension": self.choice.extension} if self.choice.extension else {}
        about |= {"duplicates": self.duplicates} if self.duplicates != "keep" else {}
        canonical = json.dumps(about | {"identity": identity.fingerprint}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def dataset_of(self, name: str) -> str:
        """The dataset of a source with this name."""
        return self.dataset if self.dataset is not None else name


@dataclass(frozen=True)
class FrozenListing(Listing):
    """The listing of a source as the frozen plan of a segment has it. `images` is empty: workers read the plan.

    What the first run passed over is not known any more. `census` has the labels of the first COUNTED_PARTS parts.
    """

    storage: Storage = field(kw_only=True)
    reservation: Reservation = field(kw_only=True)

    @property
    def num_images(self) -> int:
        return self.reservation.planned

    @property
    def num_bytes(self) -> int:
        """The size of the files in the plan; reads one column of the plan."""
        plan = self.reservation.plan
        images = read_row_groups(self.storage, plan, ["num_bytes"]) if plan else ()
        return sum(pc.sum(table["num_bytes"]).as_py() or 0 for table in (*images, self.containers))

    @property
    def labels(self) -> list[str]:
        return sorted(self.census.counts)


def find_frozen_plan(
    storage: Storage, source: str, asked: Asked, committed: Collection[int]
) -> tuple[FrozenListing, Reservation] | None:
    """The newest unfinished add of the same source with the same options, and its plan as a listing; may be None.

    It costs a small read for each unfinished add. If there is one, it asks for the first page of the source, to learn
    whether that is a file or a folder, and reads the list of containers and the labels of the first parts of the plan.
    Raises SourceError if the source is gone, DamagedFile if a reservation or its plan is damaged.
    """
    for reservation in unfinished(storage, committed):
        walk = walk_source(source, Exclusion(), PassedOver())
        name = printable(walk.name) or "root"
        if asked.fingerprint(walk.uri, name, reservation.identity) == reservation.fingerprint:
            containers = _containers_of(storage, reservation)
            listing = FrozenListing(
                uri=walk.uri,
                name=name,
                images=IMAGES.empty_table(),
                containers=containers,
                is_file=walk.is_file and reservation.planned == 1,
                kept=reservation.kept,
                choice=asked.choice,
                census=_census_of(storage, reservation, asked.labels),
                inside=LabelCensus(unread=containers["images"].null_count),
                storage=storage,
                reservation=reservation,
            )
            return listing, reservation
    return None


def _containers_of(storage: Storage, reservation: Reservation) -> pa.Table:
    if reservation.containers is None:
        return CONTAINERS.empty_table()
    return read_table(storage, reservation.containers)


def _census_of(storage: Storage, reservation: Reservation, labels: Labels) -> LabelCensus:
    """The labels of the image files in the first COUNTED_PARTS parts of a plan."""
    if reservation.plan is None:
        return LabelCensus()
    first = pa.concat_tables(islice(read_row_groups(storage, reservation.plan, ["label"]), COUNTED_PARTS))
    return census_of_files(first["label"], labels, None)
