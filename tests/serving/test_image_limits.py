"""Images whose decoding would take long: refused before it, or ended at the deadline; nobody else waits for them."""

import base64
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.serving.service import image_queue
from pipeline.serving.service.service import Limits
from tests.images import bombs
from tests.serving.serving import Served, served

TOKEN = "secret-of-the-tests"
SMALL = bombs.saved(Image.new("RGB", (40, 30), "red"), "PNG")


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("limits") / "memory"
    digits_memory.copy(place)
    with served(str(place), token=TOKEN) as running:
        yield running


def question(*images: bytes) -> dict:
    texts = [base64.b64encode(image).decode() for image in images]
    return {"image_base64": texts if len(texts) > 1 else texts[0], "k": 3}


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([bombs.jpeg_of_scans(64, 2_000)], "more than 500 scans"),
        ([bombs.jpeg_of_scans(4_000, 400)], "passes over 4000 x 4000 pixels"),
        ([bombs.jpeg_of_scans(6_000, 50)], "the work of"),
        ([bombs.jpeg_in_several_scans(64, 600)], "more than 500 scans"),
        ([bombs.float_tiff(7_200, 7_200, 100)], "7,200 x 7,200 pixels, and 50,000,000 are taken"),
        ([bombs.lossless_webp(7_000)] * 256, "and 255 others have the work of 12,544,000,000 pixels"),
        ([bombs.float_tiff(7_000, 7_000, 100)] * 64, "and 63 others have the work of"),
        ([SMALL] * 5 + [bombs.lossless_webp(6_000)] * 6, "and 10 others have the work of 216,006,000 pixels"),
        ([bombs.overlapping_tags(4_000, 1 << 20)], "its tags are longer than the file"),
        ([bombs.png_of_chunks(200_000)], "131,072 chunks"),
        ([bombs.gif_with(bombs.gif_comment(6 << 20))], "comments or junk"),
    ],
    ids=["scans", "large scans", "work", "sequential", "TIFF", "256 WebP", "64 TIFF", "mixed", "tags", "chunks", "GIF"],
)
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/search", "/v1/entries"])
def test_what_costs_too_much_is_refused_at_once(server: Served, path: str, images: list[bytes], sentence: str) -> None:
    body = question(*images)
    if path == "/v1/entries":
        body = {"image_base64": body["image_base64"], "label": "x"}
    began = time.monotonic()
    answer = server.post(path, body, TOKEN)
    assert time.monotonic() - began < 20  # most of it for reading the body
    assert answer.status_code == 422, answer.text
    assert sentence in answer.json()["detail"]
    assert answer.json()["field"] == "image" if len(images) == 1 else True


def test_an_add_over_http_has_the_limit_of_a_question(server: Served) -> None:
    large = bombs.saved(Image.new("L", (8_000, 7_000)), "PNG")
    for path in ("/v1/classify", "/v1/entries"):
        answer = server.post(path, {"image_base64": base64.b64encode(large).decode()}, TOKEN)
        assert answer.status_code == 422
        assert "8,000 x 7,000 pixels, and 50,000,000 are taken" in answer.json()["detail"]
    assert server.post("/v1/entries", {"image_base64": base64.b64encode(SMALL).decode()}, TOKEN).status_code == 200


def test_a_large_image_is_answered(server: Served) -> None:
    answer = server.post("/v1/search", question(bombs.lossless_webp(5_000)))
    assert answer.status_code == 200, answer.text
    apart = server.post("/v1/search", question(*[bombs.lossless_webp(2_500)] * 3)).json()
    alone = server.post("/v1/search", question(bombs.lossless_webp(2_500))).json()
    assert [one["neighbors"] for one in apart] == [alone["neighbors"]] * 3


def test_small_images_do_not_wait_for_large_ones(digits_memory: VisualMemory) -> None:
    """Every large one is decoded for longer than its time; none of the small ones is refused."""
    slow = question(bombs.jpeg_of_scans(2_500, 150))
    done = threading.Event()
    with served(digits_memory.log.storage.uri, limits=Limits(timeout_seconds=1.5)) as running:

        def attack() -> list[int]:
            statuses = []
            with httpx.Client(base_url=running.url, timeout=60) as client:
                while not done.is_set() and len(statuses) < 200:
                    statuses.append(client.post("/v1/classify", json=slow).status_code)
            return statuses

        assert running.post("/v1/classify", question(SMALL)).status_code == 200
        with ThreadPoolExecutor(4) as attackers:
            attacks = [attackers.submit(attack) for _ in range(4)]
            time.sleep(1)
            answers = [running.post("/v1/classify", question(SMALL)).status_code for _ in range(20)]
            done.set()
            statuses = {status for each in attacks for status in each.result()}
        assert answers == [200] * 20
        assert statuses <= {200, 429, 503}


def test_the_pixels_under_way_are_limited(digits_memory: VisualMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    large = question(bombs.lossless_webp(5_000))
    limits = Limits(request_pixels=30_000_000)
    with served(digits_memory.log.storage.uri, limits=limits) as running, ThreadPoolExecutor(6) as clients:
        asked = [
            clients.submit(lambda: httpx.post(f"{running.url}/v1/search", json=large, timeout=60)) for _ in range(6)
        ]
        statuses = [each.result().status_code for each in asked]
        assert set(statuses) == {200, 429}
        refused = next(each.result() for each in asked if each.result().status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert running.post("/v1/search", large).status_code == 200


def test_what_nobody_waits_for_is_ended(digits_memory: VisualMemory, tmp_path: Path) -> None:
    """The process that decodes is killed at the deadline, so that the next one is decoded at once."""
    slow, quick = question(bombs.jpeg_of_scans(4_900, 20)), question(bombs.lossless_webp(4_100))
    assert image_queue.LARGE_PIXELS < 4_100 * 4_100
    with served(digits_memory.log.storage.uri) as running:
        assert running.post("/v1/search", quick).status_code == 200
        answer = running.post("/v1/search", {**slow, "timeout_ms": 100})
        assert answer.status_code == 503, answer.text
        began = time.monotonic()
        assert running.post("/v1/search", quick).status_code == 200
        assert time.monotonic() - began < 8
