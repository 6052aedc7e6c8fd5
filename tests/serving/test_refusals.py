"""What a server is asked that cannot be: one sentence, the field, a 4xx; and the next request is served."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from pipeline import VisualMemory
from pipeline.serving.service.service import Limits
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"
MEBIBYTE = 1 << 20
EXAMPLES = 20  # of good and of bad requests for each operation


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("refusing") / "memory"
    digits_memory.copy(place)
    with served(str(place), token=TOKEN, limits=Limits(body_bytes=4 * MEBIBYTE)) as server:
        yield server


def bomb(side: int) -> str:
    """A PNG of so many pixels a side in a few kilobytes, in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * ((side // 8 + 1) * side), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def embedding(value: float = 0.5) -> list[float]:
    return [value] * 1280


BAD: list[tuple[Any, int, str | None, str]] = [
    ({}, 422, "image_base64", "nothing to ask about"),
    ({"image_base64": "***"}, 422, "image_base64", "no base64"),
    ({"image_base64": base64.b64encode(b"not an image").decode()}, 422, "image", "not an image in JPEG"),
    ({"image_base64": ""}, 422, "image_base64", "at least 1 character"),
    ({"image_base64": []}, 422, "image_base64", "at least 1 item"),
    ({"image_base64": bomb(20_000)}, 422, "image", "pixels"),
    ({"embedding": embedding()[:7]}, 422, "embedding", "give [queries, 1280]"),
    ({"embedding": [embedding(), embedding()[:7]]}, 422, "embedding", "several lengths"),
    ({"embedding": embedding(0.0)}, 422, "embedding", "zero or not finite"),
    ({"embedding": ["a"]}, 422, "embedding", "valid number"),
    ({"embedding": embedding(), "image_base64": "AAAA"}, 422, "embedding", "give one of them"),
    ({"embedding": [embedding()] * 300}, 422, "embedding", "ask in batches"),
    ({"embedding": embedding(), "k": 0}, 422, "k", "greater than or equal to 1"),
    ({"embedding": embedding(), "k": 1_000_000}, 422, "k", "less than or equal to 10000"),
    ({"embedding": embedding(), "k": "10"}, 422, "k", "valid integer"),
    ({"embedding": embedding(), "voting": "loudest"}, 422, "voting", "'plurality', 'distance', 'softmax' or 'rank'"),
    ({"embedding": embedding(), "label_set": "colours"}, 422, "label_set", "has no label set 'colours'"),
    ({"embedding": embedding(), "where": "year >"}, 422, "where", "where"),
    ({"embedding": embedding(), "exclude": [5]}, 422, "exclude", "exclude names id 5, which is no entry"),
    ({"embedding": embedding(), "weigh": {"5": 0.5}}, 422, "weigh", "weigh names id 5"),
    ({"embedding": embedding(), "weigh": {"5": -1}}, 422, "weigh", "greater than or equal to 0"),
    ({"embedding": embedding(), "assume": {"x": "cat"}}, 422, "assume", "valid integer"),
    ({"embedding": embedding(), "balance": "strong"}, 422, "balance", "wrong"),
    ({"embedding": embedding(), "votes": 3}, 422, "votes", "not asked for"),
    ([], 422, None, "give 1 to 256"),
    ("text", 422, None, "the body is wrong"),
]


@pytest.mark.parametrize(("body", "status", "field", "sentence"), BAD)
def test_bad_questions_are_told(server: Served, body: Any, status: int, field: str | None, sentence: str) -> None:
    answer = server.post("/v1/classify", body)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    assert sentence in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
    assert server.post("/v1/search", {"embedding": embedding(), "k": 1}).status_code == 200


@pytest.mark.parametrize(
    ("data", "content_type", "status", "sentence"),
    [
        (b"", "application/json", 400, "the body is empty"),
        (b"{", "application/json", 400, "the body is no JSON"),
        (b'{"embedding": [NaN]}', "application/json", 422, "embedding is wrong"),
        (b"\xff\xfe", "application/json", 400, "the body is no JSON"),
        (b"image", "image/png", 415, "send application/json or multipart/form-data"),
        (b"nothing", "multipart/form-data", 400, "the form cannot be read"),
        (b"x" * (5 * MEBIBYTE), "application/json", 413, "larger than 4 MiB"),
    ],
)
def test_bad_bodies_are_told(server: Served, data: bytes, content_type: str, status: int, sentence: str) -> None:
    answer = server.http.post("/v1/classify", content=data, headers={"content-type": content_type})
    assert (answer.status_code, sentence in answer.json()["detail"]) == (status, True), answer.text
    assert server.post("/v1/search", {"embedding": embedding(), "k": 1}).status_code == 200


def test_a_body_without_end_is_cut_off(server: Served) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += MEBIBYTE
            yield b"x" * MEBIBYTE

    try:
        answer = server.http.post("/v1/classify", content=endless(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    except httpx.WriteError:  # the server has closed the connection
        pass
    assert sent < 100 * MEBIBYTE
    assert server.post("/v1/search", {"embedding": embedding(), "k": 1}).status_code == 200


@pytest.mark.parametrize(
    "fields", [{"k": "many"}, {"exclude": "x"}, {"weigh": "5"}, {"colour": "red"}, {"k": ["1", "2"]}]
)
def test_bad_fields_of_a_form_are_told(server: Served, fields: dict[str, Any]) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    answer = server.http.post("/v1/classify", files={"image": image.getvalue()}, data=fields)
    assert (answer.status_code, answer.json()["field"]) == (422, next(iter(fields)))
    assert server.http.post("/v1/classify", files={"image": b""}).status_code in {400, 422}


def test_edits_need_the_token(server: Served) -> None:
    before = server.service.state.version
    edits: list[tuple[str, dict]] = [
        ("/v1/entries", {"image_base64": "AAAA"}),
        ("/v1/forget", {"labels": ["0"]}),
        ("/v1/relabel", {"ids": [1], "label": "x"}),
        ("/v1/reload", {}),
    ]
    for path, body in edits:
        for token in (None, "", "another", TOKEN[:-1], f"{TOKEN}s"):
            answer = server.post(path, body, token)
            assert (answer.status_code, TOKEN in answer.text) == (401, False), (path, token)
    assert server.http.get("/v1/status").json()["version"] == before


def test_without_a_token_nothing_can_be_changed(digits_memory: VisualMemory) -> None:
    with served(digits_memory.uri) as reading:
        for path in ("/v1/entries", "/v1/forget", "/v1/relabel", "/v1/reload"):
            answer = reading.post(path, {"labels": ["0"]}, "any")
            assert (answer.status_code, "start it with a token" in answer.json()["detail"]) == (403, True)


def operations(server: Served) -> list[Any]:
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    return [result.ok() for result in schema.get_all_operations()]


def test_the_openapi_document_keeps_its_word(server: Served) -> None:
    """Requests drawn from the server's own document, good and bad: none ends in a 5xx, none in an unknown answer."""
    load_all_checks()
    checks = CHECKS.get_by_names(
        [
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
        ]
    )
    asked: dict[str, int] = {}
    for operation in operations(server):
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters):
                continue  # there is nothing to be wrong about

            @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                for body in case.body if isinstance(case.body, list) else [case.body]:
                    if isinstance(body, dict):
                        body.pop("timeout_ms", None)  # of a millisecond, a 503 would be the right answer
                answer = case.call(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"})
                case.validate_response(answer, checks=checks)
                asked[case.path] = asked.get(case.path, 0) + 1

            ask()
    assert set(asked) >= {"/v1/classify", "/v1/search", "/v1/entries/{id}", "/knn-service", "/v1/forget", "/healthz"}
    assert min(asked["/v1/classify"], asked["/v1/search"]) >= EXAMPLES


@pytest.mark.parametrize("thumbnails", [True, False])
def test_a_file_named_by_another_hash_is_not_shown(
    digits_memory: VisualMemory, tmp_path: Path, thumbnails: bool
) -> None:
    digits_memory.copy(tmp_path / "memory")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(image, "PNG")
    with served(str(tmp_path / "memory"), token=TOKEN, thumbnails=thumbnails) as server:
        body = {"image_base64": base64.b64encode(image.getvalue()).decode(), "label": "blue"}
        for uri in (str(secret), "http://127.0.0.1:1/x.png"):
            added = server.post("/v1/entries", {**body, "uri": uri}, TOKEN).json()
            answer = server.http.get(f"/v1/entries/{added['id']}/image")
            if thumbnails:
                red, _, blue = Image.open(io.BytesIO(answer.content)).convert("RGB").getpixel((4, 4))
                assert (red < 50, blue > 200) == (True, True)
            else:
                assert (answer.status_code, answer.json()["field"]) == (404, "id")
