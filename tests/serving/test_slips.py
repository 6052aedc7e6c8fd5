"""What people send by mistake is answered by what to do, and what is meant is taken however it was wrapped."""

import base64
import io
import json
import textwrap
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import VisualMemory
from pipeline.serving.encoded import decode_image
from pipeline.serving.http.slips import in_fields
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("slips") / "memory"
    digits_memory.copy(place)
    with served(str(place), token=TOKEN) as server:
        yield server


def png(seed: int = 0, side: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def send(server: Served, path: str, *, token: bool = True, **request: Any) -> tuple[int, dict]:
    headers = request.pop("headers", {}) | ({"Authorization": f"Bearer {TOKEN}"} if token else {})
    answer = server.http.post(path, headers=headers, **request)
    return answer.status_code, answer.json()


# Base64


def wrapped(text: str, width: int, end: str) -> str:
    return end.join(textwrap.wrap(text, width)) + end


FORMS: dict[str, Callable[[bytes], str]] = {
    "plain": lambda data: base64.b64encode(data).decode(),
    "wrapped at 76": lambda data: wrapped(base64.b64encode(data).decode(), 76, "\n"),
    "wrapped at 64 with carriage returns": lambda data: wrapped(base64.b64encode(data).decode(), 64, "\r\n"),
    "encodebytes": lambda data: base64.encodebytes(data).decode(),
    "spaces and tabs": lambda data: wrapped(base64.b64encode(data).decode(), 20, " \t"),
    "white space before and after": lambda data: f"\n  {base64.b64encode(data).decode()}\n\n",
    "the alphabet of URLs": lambda data: base64.urlsafe_b64encode(data).decode(),
    "without padding": lambda data: base64.b64encode(data).decode().rstrip("="),
    "of URLs, without padding, wrapped": lambda data: wrapped(
        base64.urlsafe_b64encode(data).decode().rstrip("="), 60, "\n"
    ),
    "too much padding": lambda data: base64.b64encode(data).decode().rstrip("=") + "====",
    "data URL": lambda data: f"data:image/png;base64,{base64.b64encode(data).decode()}",
    "data URL with parameters": lambda data: f"data:image/png;name=a.png;base64,{base64.b64encode(data).decode()}",
    "data URL in capitals, wrapped": lambda data: f"DATA:image/png;BASE64,\n{base64.encodebytes(data).decode()}",
    "data URL, percent-encoded": lambda data: (
        "data:image/png;base64," + urllib.parse.quote(base64.b64encode(data).decode(), safe="")
    ),
    "data URL without a type": lambda data: f"data:;base64,{base64.b64encode(data).decode()}",
}


@pytest.mark.parametrize("form", FORMS)
def test_base64_is_taken_in_every_form(form: str) -> None:
    for length in (1, 2, 3, 57, 58, 1_000):
        data = np.random.default_rng(length).bytes(length)
        assert decode_image(FORMS[form](data)) == data


@pytest.mark.parametrize("form", FORMS)
def test_every_route_takes_wrapped_base64(server: Served, form: str, digits: Path) -> None:
    image = sorted((digits / "ask" / "3").iterdir())[0].read_bytes()
    text = FORMS[form](image)
    plain = server.post("/v1/classify", {"image_base64": FORMS["plain"](image)}).json()
    assert server.post("/v1/classify", {"image_base64": text}).json() == plain
    assert server.post("/v1/classify", {"image_base64": [text, text]}).json() == [plain, plain]
    assert server.post("/v1/search", {"image_base64": text}).status_code == 200
    assert server.post("/knn-service", {"image": text, "num_images": 1}).status_code == 200
    assert server.http.post("/v1/classify", files={"image_base64": (None, text)}).json() == plain
    status, added = send(server, "/v1/entries", json={"image_base64": text, "label": "3"})
    assert (status, len(added["ids"])) == (200, 1)
    send(server, "/v1/forget", json={"ids": added["ids"]})


def test_lines_broken_within_json_are_taken(server: Served, digits: Path) -> None:
    """As a shell makes it of what `base64 new.jpg` prints."""
    image = sorted((digits / "ask" / "3").iterdir())[0].read_bytes()
    plain = server.post("/v1/classify", {"image_base64": FORMS["plain"](image)}).json()
    for end in ("\n", "\r\n", "\t"):
        body = f'{{"image_base64": "{wrapped(FORMS["plain"](image), 76, end)}"}}'.encode()
        assert send(server, "/v1/classify", content=body) == (200, plain)
        assert send(server, "/v1/classify", content=b"[" + body + b"]") == (200, [plain])
    assert send(server, "/v1/classify", content=b'{"image_base64": "AA\nAA"')[0] == 400
    assert send(server, "/v1/classify", content=b'\n{"a":' * 100_000)[0] == 400
    assert send(server, "/v1/classify", content=b'{"embedding": [NaN], "where": "a\nb"}')[0] == 422


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("***", "no base64"),
        ("AAAA=AAAA", "no base64"),
        ("AAAAA", "no base64"),
        ("ü" * 8, "no base64"),
        ("=", "empty"),
        (" \n ", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png,%89PNG", "not in base64"),
        ("data:image/png", "not in base64"),
        ("new.jpg", "name of a file"),
        ("@/home/me/My Photos/new.JPEG", "name of a file"),
        ("https://example.org/new.jpg", "an address"),
        ("s3://bucket/new", "an address"),
        ("<b>", "no base64"),
        ("AAAA\x00AAA", "no base64"),
    ],
)
def test_what_is_no_base64_is_refused_in_a_sentence(server: Served, text: str, sentence: str) -> None:
    for path, field in (("/v1/classify", "image_base64"), ("/v1/entries", "image_base64"), ("/knn-service", "image")):
        status, answer = send(server, path, json={field: text})
        assert (status, answer["field"]) == (422, field), answer
        assert sentence in answer["detail"]
        assert answer["detail"].isprintable()


# Forms


def test_one_image_is_taught_by_a_form(server: Served) -> None:
    status, added = send(
        server, "/v1/entries", files={"image": png(1)}, data={"label": "noise", "uri": "one", "dataset": "d"}
    )
    assert status == 200
    entry = server.http.get(f"/v1/entries/{added['id']}").json()
    assert (entry["label"], entry["uri"], entry["dataset"], entry["width"]) == ("noise", "one", "d", 40)


def test_many_images_are_one_commit(server: Served) -> None:
    before = server.http.get("/v1/status").json()["version"]
    files = [("image", (f"{seed}.png", png(seed))) for seed in range(10, 14)]
    status, added = send(server, "/v1/entries", files=files, data={"label": "noise"})
    assert (status, len(added["ids"]), added["version"]) == (200, 4, before + 1)
    assert [str(entry_id) for entry_id in added["ids"]] == added["ids_text"]
    assert {server.http.get(f"/v1/entries/{i}").json()["label"] for i in added["ids"]} == {"noise"}
    files = [("image", (f"{seed}.png", png(seed))) for seed in (20, 21)]
    status, added = send(server, "/v1/entries", files=files, data={"label": ["cat", "dog"], "uri": ["a", "b"]})
    entries = [server.http.get(f"/v1/entries/{i}").json() for i in added["ids"]]
    assert [(entry["label"], entry["uri"]) for entry in entries] == [("cat", "a"), ("dog", "b")]
    images = [base64.b64encode(png(seed)).decode() for seed in (22, 23)]
    status, added = send(server, "/v1/entries", json={"image_base64": images, "label": ["cat", None]})
    assert [server.http.get(f"/v1/entries/{i}").json()["label"] for i in added["ids"]] == ["cat", None]


@pytest.mark.parametrize(
    ("request_", "field", "sentence"),
    [
        ({"files": {"image": (None, "new.jpg")}}, "image", "image=@new.jpg"),
        ({"files": {"image": (None, "@new.jpg")}}, "image", "image=@new.jpg"),
        ({"files": {"image": (None, "data:image/png;base64,AAAA")}}, "image", "image_base64"),
        ({"files": {"photo": png()}}, "photo", "name it image"),
        ({"files": {"image": b""}}, None, ""),
        ({"files": {"image": png(), "lable": (None, "x")}}, "lable", "did you mean label"),
        ({"files": {"label": (None, "x")}}, "image_base64", "there is no image"),
        ({"files": [("image", png()), ("image", png(1)), ("uri", (None, "x"))]}, "uri", "give one for each"),
        ({"files": [("image", png()), ("label", (None, "a")), ("label", (None, "b"))]}, "label", "give one for each"),
        ({"files": {"image": png(), "image_base64": (None, "AAAA")}}, "image", "give one of them"),
        ({"files": {"image": b"not an image"}}, None, "cannot be used"),
        ({"json": {"image_base64": []}}, "image_base64", "at least 1"),
        ({"json": {"image": "AAAA"}}, "image", "did you mean image_base64"),
        ({"json": {"image_url": "https://example.org/x.jpg"}}, "image_url", "nothing is fetched"),
        ({"json": {"image_base64": base64.b64encode(png()).decode(), "lables": "x"}}, "lables", "did you mean label"),
        ({"json": {"image_base64": base64.b64encode(png()).decode(), "label": 5}}, "label", "string"),
    ],
)
def test_slips_of_teaching_say_what_to_do(server: Served, request_: dict, field: str | None, sentence: str) -> None:
    status, answer = send(server, "/v1/entries", **request_)
    assert status in {400, 422}, answer
    assert sentence in answer["detail"]
    assert field is None or answer["field"] == field
    assert "--" not in answer["detail"]


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/search", "/v1/entries"])
@pytest.mark.parametrize(
    ("content", "content_type", "status", "sentence"),
    [
        (png(), "image/png", 415, "-F image=@new.jpg"),
        (png(), FORM, 415, "-F image=@new.jpg"),
        (png(), "application/json", 400, "-F image=@new.jpg"),
        (png(), "application/octet-stream", 415, "-F image=@new.jpg"),
        (b"\xff\xd8\xff\xe0JFIF", None, 400, "-F image=@new.jpg"),
        (b"image=new.jpg", FORM, 400, "-F image=@new.jpg"),
        (b"image=@new.jpg&k=5", FORM, 400, "send a JSON object"),
        (b"--x\r\nContent-Disposition: form-data; name=image\r\n", "application/json", 400, "let your program"),
        (b"{'image_base64': 'x'}", "application/json", 400, "no JSON"),
        (b"", None, 400, "empty"),
        (b"<xml/>", "text/xml", 415, "application/json"),
        (b"x", "image/png\t; a", 415, "application/json"),
    ],
)
def test_bodies_of_another_kind_say_what_to_do(
    server: Served, path: str, content: bytes, content_type: str | None, status: int, sentence: str
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    found, answer = send(server, path, content=content, headers=headers)
    assert (found, sentence in answer["detail"]) == (status, True), answer


def test_json_without_a_content_type_is_json(server: Served) -> None:
    body = json.dumps({"embedding": [0.5] * 1280, "k": 1}).encode()
    taken = ["APPLICATION/JSON", "application/json; charset=utf-8", "application/vnd.x+json", FORM]
    for headers in ({}, *({"Content-Type": content_type} for content_type in taken)):
        assert send(server, "/v1/search", content=body, headers=headers)[0] == 200
    # What a page of another site can send without asking first, and no program needs.
    for content_type in (
        "text/plain",
        "text/plain;charset=utf-8",
        "text/html",
        "application/jsonp",
        "json",
        "a/b+jsonx",
    ):
        assert send(server, "/v1/search", content=body, headers={"Content-Type": content_type})[0] == 415
    assert send(server, "/v1/forget", content=b'{"labels": ["no such"]}', headers={"Content-Type": FORM})[0] == 422


# Fields


@pytest.mark.parametrize(
    ("path", "body", "field", "sentence"),
    [
        ("/v1/forget", {"id": 5}, "id", "did you mean ids: [5]?"),
        ("/v1/forget", {"label": "cat"}, "label", 'did you mean labels: ["cat"]?'),
        ("/v1/forget", {"uri": "/a/b.png"}, "uri", 'did you mean uris: ["/a/b.png"]?'),
        ("/v1/forget", {"ids": 5}, "ids", "give a list, as in ids: [5]"),
        ("/v1/forget", {"labels": "cat"}, "labels", 'give a list, as in labels: ["cat"]'),
        ("/v1/forget", {"idz": [5]}, "idz", "did you mean ids"),
        ("/v1/forget", {}, "ids", "give ids, uris, labels or datasets"),
        ("/v1/forget", {"ids": []}, "ids", "give ids, uris, labels or datasets"),
        ("/v1/forget", {"ids": [5]}, None, "no entry with id 5"),
        ("/v1/forget", {"ids": ["five"]}, "ids", "valid integer"),
        ("/v1/forget", {"file": "list.csv"}, "file", "leave it out"),
        ("/v1/relabel", {"id": 5, "label": "x"}, "id", "did you mean ids: [5]?"),
        ("/v1/relabel", {"ids": [5], "labels": "x"}, "labels", "did you mean label"),
        ("/v1/relabel", {"ids": [5]}, "label", "give it"),
        ("/v1/relabel", {"ids": [5], "label": "x"}, None, "no entry with id 5"),
        ("/v1/classify", {"embeddings": [0.5]}, "embeddings", "did you mean embedding?"),
        ("/v1/classify", {"embedding": [0.5] * 1280, "K": 5}, "K", "did you mean k?"),
        ("/v1/classify", {"embedding": [0.5] * 1280, "top_k": 5}, "top_k", "did you mean k?"),
        ("/v1/classify", {"embedding": [0.5] * 1280, "label-set": "x"}, "label-set", "did you mean label_set?"),
        ("/v1/classify", {"embedding": [0.5] * 1280, "excluded": [5]}, "excluded", "did you mean exclude"),
        ("/v1/classify", {"embedding": [0.5] * 1280, "exclude": 5}, "exclude", "give a list, as in exclude: [5]"),
        ("/v1/classify", {"embedding": [0.5] * 1280, "colour\u2028\x1b[31m": 1}, None, "leave it out"),
        ("/v1/classify", {"embedding": [0.5] * 1280, "label_set": "none"}, "label_set", "no label set"),
        ("/v1/search", {"embedding": [0.5] * 1280, "voting": "rank"}, "voting", "leave it out"),
    ],
)
def test_names_that_are_not_quite_right(
    server: Served, path: str, body: dict, field: str | None, sentence: str
) -> None:
    status, answer = send(server, path, json=body)
    assert status == 422, answer
    assert sentence in answer["detail"]
    assert field is None or answer["field"] == field
    assert "--" not in answer["detail"], "flags are of another interface"
    assert "`search`" not in answer["detail"]
    assert answer["detail"].isprintable()


def test_the_first_wrong_question_of_a_list_is_named(server: Served) -> None:
    status, answer = send(server, "/v1/classify", json=[{"embedding": [0.5] * 1280}, {"emebdding": [0.5] * 1280}])
    assert (status, answer["field"]) == (422, "emebdding")
    assert "did you mean embedding?" in answer["detail"]


def test_flags_in_messages_of_the_library_become_fields() -> None:
    assert in_fields("give `ids`, `uris` or `label_set`, run `verify`") == "give ids, uris or label_set, run `verify`"
    assert in_fields("has no entry with id 5: `search` and `classify --json` show ids").endswith(
        "POST /v1/search shows ids"
    )


def test_a_path_or_a_method_that_is_not_there_says_so(server: Served) -> None:
    answer = server.http.get("/v1/clasify")
    assert (answer.status_code, "GET /docs" in answer.json()["detail"]) == (404, True)
    answer = server.http.get("/v1/classify")
    assert (answer.status_code, answer.json()["detail"]) == (405, "GET is not answered here: use POST")
    answer = server.http.get("/v1/entries/five")
    assert (answer.status_code, answer.json()["field"]) == (422, "id")
