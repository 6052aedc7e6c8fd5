"""Entry ids hold segment, part and row, and order as plans do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.store.tables import ids


@given(st.integers(0, ids.MAX_SEGMENTS - 1), st.integers(0, ids.MAX_PARTS - 1), st.integers(1, ids.MAX_PART_ROWS))
def test_ids_round_trip_and_fit_int64(segment: int, part: int, rows: int) -> None:
    made = ids.part_ids(segment, part, rows)
    assert made.dtype == np.int64
    assert (made >= 0).all()
    assert (np.diff(made) == 1).all()
    assert ids.split_id(int(made[-1])) == (segment, part, rows - 1)


@given(st.integers(1, 3 * 10**9))
def test_parts_stay_within_their_bounds(planned: int) -> None:
    rows = ids.rows_per_part(planned)
    assert ids.MIN_PART_ROWS <= rows <= ids.MAX_PART_ROWS
    assert -(-planned // rows) < ids.MAX_PARTS
    if planned > ids.MIN_PART_ROWS * ids.PARTS_AIMED_AT and rows < ids.MAX_PART_ROWS:
        assert -(-planned // rows) <= ids.PARTS_AIMED_AT


def test_a_number_beyond_its_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="split the source"):
        ids.first_id(1, ids.MAX_PARTS)
