"""An ingest from a store that spoils some of its answers has the rows of an undisturbed one."""

import pytest

from tests.end_to_end.spoiled_ingest import spoil


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_ingest_through_a_bad_connection_has_the_same_rows() -> None:
    found = spoil(num_images=2_000, share=0.03, seed=0)
    assert found["same_rows"], found
    assert found["entries"] == (1_993, 1_993)
    assert found["GET cut off"] > 5
    assert found["GET 503"] > 5
    assert found["GET none"] > 5
