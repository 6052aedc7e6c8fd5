"""Ids beyond 2 ** 53, which JavaScript rounds: text in every answer, and taken as text in every request."""

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import Client, VisualMemory
from pipeline.store.layout import GIVEN_UP
from pipeline.store.tables.ids import split_id
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"
LARGEST_EXACT = (1 << 53) - 1
SEGMENT = 16_390  # the first of whose ids is beyond that


def noise(seed: int) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.fixture
def server(digits_memory: VisualMemory, tmp_path: Path) -> Iterator[Served]:
    digits_memory.copy(tmp_path / "memory")
    (tmp_path / "memory" / "segments" / f"{SEGMENT - 1:08d}").mkdir()
    (tmp_path / "memory" / "segments" / f"{SEGMENT - 1:08d}" / GIVEN_UP).write_text("{}")  # a number is used once
    with served(str(tmp_path / "memory"), token=TOKEN) as server:
        yield server


def test_every_answer_has_ids_as_text_and_every_request_takes_them(server: Served) -> None:
    images = [noise(seed) for seed in range(3)]
    added = server.post("/v1/entries", {"image_base64": images, "label": "noise"}, TOKEN).json()
    texts = added["ids_text"]
    assert split_id(added["ids"][1])[0] == SEGMENT
    assert int(float(texts[1])) != int(texts[1]), "a float rounds it"
    assert (added["id_text"], [int(text) for text in texts]) == (texts[0], added["ids"])
    for path in ("/v1/search", "/v1/classify"):
        [neighbor] = server.post(path, {"image_base64": images[1], "k": 1}).json()["neighbors"]
        assert (neighbor["id"], neighbor["id_text"]) == (int(texts[1]), texts[1])
    [found] = server.post("/knn-service", {"image": images[1], "num_images": 1}).json()
    assert found["id_text"] == texts[1]
    assert server.http.get(f"/v1/entries/{texts[1]}").json()["id_text"] == texts[1]
    assert server.http.get(f"/v1/entries/{texts[1]}/image").status_code == 200
    asked = {"image_base64": images[1], "k": 2, "exclude": [texts[0]], "assume": {texts[1]: "other"}}
    answer = server.post("/v1/classify", {**asked, "weigh": {texts[2]: 0.5}}).json()
    assert answer["neighbors"][0]["id_text"] == texts[1]
    assert answer["neighbors"][0]["label"] == "other"
    assert texts[0] not in {n["id_text"] for n in answer["neighbors"]}
    form = {"k": "2", "exclude": texts[0], "weigh": f"{texts[2]}=0.5", "assume": f"{texts[1]}=other"}
    image = base64.b64decode(images[1])
    assert server.http.post("/v1/classify", files={"image": image}, data=form).json() == answer
    relabelled = server.post("/v1/relabel", {"ids": texts[:2], "label": "two"}, TOKEN).json()
    assert relabelled["relabelled"] == 2
    forgotten = server.post("/v1/forget", {"ids": [texts[0], int(texts[1])]}, TOKEN).json()
    assert forgotten["forgotten"] == 2
    assert server.http.get(f"/v1/entries/{texts[2]}").json()["label"] == "noise"
    with Client(server.url, TOKEN) as client:
        assert client.search([image], k=3)[0][0].id == int(texts[2]), "the client reads it as it is"


def test_a_rounded_id_is_refused_with_the_reason(server: Served) -> None:
    added = server.post("/v1/entries", {"image_base64": [noise(9)] * 2}, TOKEN).json()
    rounded = int(float(added["ids"][1]))
    assert rounded != added["ids"][1]
    answer = server.http.get(f"/v1/entries/{rounded + 4_096}")
    assert (answer.status_code, "take them from id_text" in answer.json()["detail"]) == (404, True)


@pytest.mark.parametrize("text", ["", "-5", "5.0", "5e3", "0x5", "five", "\u0665", "1" * 20, str(1 << 63), "5_0"])
def test_text_that_is_no_id_is_refused(server: Served, text: str) -> None:
    for path, body in (
        ("/v1/forget", {"ids": [text]}),
        ("/v1/relabel", {"ids": [text], "label": "x"}),
        ("/v1/classify", {"embedding": [0.5] * 1280, "exclude": [text]}),
        ("/v1/classify", {"embedding": [0.5] * 1280, "weigh": {text: 1}}),
    ):
        answer = server.post(path, body, TOKEN)
        assert answer.status_code == 422, (path, text, answer.text)
        assert answer.json()["field"] in {"ids", "exclude", "weigh"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs JavaScript")
def test_javascript_keeps_the_text_and_rounds_the_number(server: Served, tmp_path: Path) -> None:
    added = server.post("/v1/entries", {"image_base64": [noise(11), noise(12)], "label": "js"}, TOKEN).json()
    script = """
const [url, token, image] = process.argv.slice(2);
const json = {"Content-Type": "application/json"};
const ask = async (path, body, more) => (await fetch(url + path,
  {method: "POST", headers: {...json, ...more}, body: JSON.stringify(body)})).json();
const found = (await ask("/v1/search", {image_base64: image, k: 1})).neighbors[0];
const label = {ids: [found.id_text], label: "by text"};
const done = await ask("/v1/relabel", label, {Authorization: `Bearer ${token}`});
const entry = await (await fetch(`${url}/v1/entries/${found.id_text}`)).json();
console.log(JSON.stringify({number: String(found.id), text: found.id_text, done: done.relabelled, label: entry.label}));
"""
    (tmp_path / "ask.mjs").write_text(script)
    command = ["node", str(tmp_path / "ask.mjs"), server.url, TOKEN, noise(12)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert said["text"] == added["ids_text"][1]
    assert said["number"] != said["text"]
    assert (said["done"], said["label"]) == (1, "by text")
