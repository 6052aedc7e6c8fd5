"""What is taught over HTTP has a picture from then on, and a server says what it serves."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.index.build.plan import IndexOptions
from tests.serving.serving import served

TOKEN = "a token of the tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def noise(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (200, 100, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def memory(digits_memory: VisualMemory, tmp_path: Path) -> VisualMemory:
    return VisualMemory(shutil.copytree(digits_memory.uri, tmp_path / "memory"))


@pytest.mark.parametrize("groups", [1, 3])
def test_an_image_taught_over_http_has_a_picture(memory: VisualMemory, groups: int) -> None:
    with served(memory.uri, groups, token=TOKEN) as server:
        added = server.http.post("/v1/entries", files={"image": noise(1)}, data={"label": "noise"}, headers=HEADERS)
        entry = added.json()["id"]
        picture = server.http.get(f"/v1/entries/{entry}/image")
        assert picture.headers["content-type"] == "image/jpeg"
        shown = Image.open(io.BytesIO(picture.content))
        assert (max(shown.size), shown.height > shown.width) == (112, True)
        [neighbor] = server.http.post("/v1/classify", files={"image": noise(1)}, data={"k": "1"}).json()["neighbors"]
        assert neighbor["id"] == entry
        memory.compact()
        server.http.post("/v1/reload", headers=HEADERS)
        assert server.http.get(f"/v1/entries/{entry}/image").content == picture.content
        server.http.post("/v1/forget", json={"ids": [entry]}, headers=HEADERS)
        assert server.http.get(f"/v1/entries/{entry}/image").status_code == 404
    decision = VisualMemory(memory.uri, at=memory.log.latest().version - 2).classify([noise(1)], k=1)[0]
    page = VisualMemory(memory.uri, at=decision.version).explanation_page(decision)
    assert "data:image/jpeg" in page
    assert "no picture: it was given as bytes" in page, "the question's own; the entry's is there"
    assert page.count("no picture") == 1


def test_without_thumbnails_a_page_says_how_to_get_them(memory: VisualMemory) -> None:
    with served(memory.uri, token=TOKEN, thumbnails=False) as server:
        added = server.http.post("/v1/entries", files={"image": noise(2)}, headers=HEADERS).json()
        answer = server.http.get(f"/v1/entries/{added['id']}/image")
        assert (answer.status_code, "with thumbnails" in answer.json()["detail"]) == (404, True)
    [found] = memory.search([noise(2)], k=1)
    decision = memory.classify([noise(2)], k=3)[0]
    assert found[0].id == added["id"]
    assert "--thumbnails" not in memory.explanation_page(decision), "without a label it does not vote"
    memory.relabel(ids=[added["id"]], label="noise")
    page = memory.explanation_page(memory.classify([noise(2)], k=3)[0])
    assert "1 of 3 pictures cannot be shown: 1 because it was taught as bytes, and no thumbnail was kept" in page


def test_fresh_entries_are_those_that_can_be_found(memory: VisualMemory) -> None:
    ids = [int(entry_id) for entry_id in memory.live().live_ids()]
    memory.forget(ids=ids[:3])
    with served(memory.uri, token=TOKEN) as server:
        found = server.http.get("/v1/status").json()
        assert (found["entries"], found["fresh"]) == (97, 97)
        memory.index(IndexOptions(key="Flat"))
        added = server.http.post("/v1/entries", files={"image": noise(3)}, headers=HEADERS).json()
        found = server.http.get("/v1/status").json()
        assert (found["entries"], found["fresh"]) == (98, 1)
        server.http.post("/v1/forget", json={"ids": [added["id"], ids[5]]}, headers=HEADERS)
        found = server.http.get("/v1/status").json()
        assert (found["entries"], found["fresh"]) == (96, 0)
