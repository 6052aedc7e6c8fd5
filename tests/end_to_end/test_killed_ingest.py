"""An ingest on two nodes whose driver, actor and node are killed has the rows of an undisturbed one."""

import pytest

from tests.end_to_end.killed_ingest import rehearse


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_ingest_killed_and_continued_has_the_same_rows() -> None:
    found = rehearse(num_images=4_000, num_kills=3, seed=1, by_work=True)
    assert found["same_rows"], found
    assert found["undisturbed_embedded"] == 4_000
    assert all(0 < kill["embedded"] < 4_000 for kill in found["kills"]), "a kill met no work under way"
    assert found["embedded_twice_of_all"] < 0.05, found
