"""Which containers share a part."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store.segments.container_parts import IMAGE_CONTAINERS, _Row, images_counted, rows_of_part, share_parts
from pipeline.store.segments.reservations import Reservation, SegmentSpec
from pipeline.store.tables import ids
from pipeline.store.tables.schemas import CONTAINERS
from tests.conftest import identity_of

SIZES = st.one_of(st.none(), st.integers(0, 1 << 20), st.integers(0, 1 << 32))
ROWS = st.tuples(
    st.sampled_from(["tar", "parquet", "npy", "vectors"]), SIZES, st.one_of(st.none(), st.integers(0, 1 << 20))
)


def table(rows: list[tuple[str, int | None, int | None]]) -> pa.Table:
    found = [
        {"uri": f"/{at:06d}.{kind}", "kind": kind, "num_bytes": num_bytes, "images": images}
        for at, (kind, num_bytes, images) in enumerate(rows)
    ]
    return pa.Table.from_pylist(found, schema=CONTAINERS)


@given(st.lists(ROWS, max_size=300))
def test_each_part_has_no_more_than_a_part_of_images_and_is_of_one_kind(rows: list) -> None:
    containers = table(rows)
    parts = share_parts(containers)
    assert parts == share_parts(containers)
    if not parts:
        parts = (1,) * len(rows)
    assert sum(parts) == len(rows)
    counted = [images_counted(_Row(kind, "/x.tar", num_bytes, images)) for kind, num_bytes, images in rows]
    most = ids.rows_per_part(sum(counted))
    before = None
    for at in range(len(parts)):
        within = rows_of_part(parts, at)
        assert len(within) == parts[at]
        here = sum(counted[row] for row in within)
        assert here <= most or len(within) == 1
        [kind] = {rows[row][0] in IMAGE_CONTAINERS for row in within}
        if before is not None and before[0] == kind:  # closed only because the next did not fit
            assert before[1] + counted[within.start] > most
        before = kind, here


def test_a_hundred_thousand_small_archives_make_as_many_parts_as_image_files_would() -> None:
    parts = share_parts(table([("tar", 40_960, None)] * 100_000))
    assert len(parts) == ids.PARTS_AIMED_AT
    assert max(parts) == parts[0] == -(-100_000 // ids.PARTS_AIMED_AT) + 2
    many = share_parts(table([("tar", 1_000_000, None)] * 20_000))
    assert max(many) * 1_000_000 <= 256 << 20


def test_large_containers_and_those_of_unknown_size_are_alone() -> None:
    assert share_parts(table([("tar", 1 << 30, None)] * 200)) == ()
    assert share_parts(table([("tar", None, None)] * 200)) == ()
    assert share_parts(table([])) == ()
    assert share_parts(table([("tar", 10_240, None), ("tar", None, None), ("tar", 10_240, None)])) == ()


def test_a_compressed_archive_counts_for_more() -> None:
    plain, packed = (images_counted(_Row("tar", f"/x.{end}", 1 << 20, None)) for end in ("TAR", "tar.gz"))
    assert packed == 16 * plain == 16 * 64


@pytest.mark.parametrize("parts", [(1, 1), (2, 2), (3, 0), (4, -1)])
def test_parts_that_are_not_of_the_containers_are_refused(parts: tuple[int, ...]) -> None:
    spec = SegmentSpec(fingerprint="f", source="/", dataset="d", identity=identity_of(8))
    whole = Reservation(**dict(spec), number=1, planned=0, rows_per_part=128, plan=None, num_containers=3)
    assert "container_parts" not in whole.model_dump_json()
    with pytest.raises(ValueError, match="container"):
        Reservation.model_validate(whole.model_dump() | {"container_parts": parts})
    shared = Reservation.model_validate(whole.model_dump() | {"container_parts": (1, 2)})
    assert Reservation.model_validate_json(shared.model_dump_json()) == shared
    assert (shared.num_parts, whole.num_parts) == (2, 3)
